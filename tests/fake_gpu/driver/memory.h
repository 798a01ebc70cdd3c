// Memory of the fake devices.
#pragma once

#include <cstddef>

namespace fake {

bool on_device(const void* address);

// Copies, or leaves out a copy that is too large to be kept; see memory.cpp.
void keep(void* target, const void* source, size_t bytes);

}  // namespace fake
