#include "tally.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>

namespace fake {

// Libraries register their kernels before this one's own globals are constructed, and still call at
// exit, after they are destroyed: so what is global is made on first use, and never destroyed.
static std::mutex& lock() {
  static auto* made = new std::mutex;
  return *made;
}

static std::map<std::string, double>& sums() {
  static auto* made = new std::map<std::string, double>;
  return *made;
}

void tally(const std::string& name, double amount) {
  std::lock_guard<std::mutex> guard(lock());
  sums()[name] += amount;
}

void* new_handle() {
  static std::atomic<uintptr_t> last{0x1000};
  return reinterpret_cast<void*>(last += 16);
}

}  // namespace fake

EXPORT void fake_gpu_reset() {
  std::lock_guard<std::mutex> guard(fake::lock());
  fake::sums().clear();
}

// All sums as JSON, valid until the next call.
EXPORT const char* fake_gpu_tallies() {
  static auto* text = new std::string;
  std::lock_guard<std::mutex> guard(fake::lock());
  *text = "{";
  for (const auto& [name, sum] : fake::sums()) {
    char number[32];
    snprintf(number, sizeof number, "%.17g", sum);
    *text += (text->size() > 1 ? ", \"" : "\"") + name + "\": " + number;
  }
  *text += "}";
  return text->c_str();
}
