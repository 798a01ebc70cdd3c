// What the fake device was asked to do, by name, for the tests to read.
#pragma once

#include <string>

namespace fake {

// Adds to a name's sum; from any thread.
void tally(const std::string& name, double amount = 1);

// A handle that no other call returns, for what a caller only passes back.
void* new_handle();

}  // namespace fake

#define EXPORT extern "C" __attribute__((visibility("default")))
