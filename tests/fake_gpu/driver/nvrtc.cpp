// NVRTC: what is handed to it to compile is not read, as nothing of it will run. Kernels of such
// programs are launched by driver_api.cpp, as "kernel compiled here".
#include <set>
#include <string>

#include "tally.h"

using Result = int;  // nvrtcResult, of which 0 is success

#define NVRTC(name, ...) EXPORT Result name(__VA_ARGS__)

NVRTC(nvrtcCreateProgram, void** program, const char*, const char*, int, const char* const*,
      const char* const*) {
  *program = fake::new_handle();
  return 0;
}

NVRTC(nvrtcDestroyProgram, void**) { return 0; }

NVRTC(nvrtcAddNameExpression, void*, const char*) { return 0; }

NVRTC(nvrtcCompileProgram, void*, int, const char* const*) { return 0; }

// A kernel's name in its source is its name in the object, too. It must outlive the program.
NVRTC(nvrtcGetLoweredName, void*, const char* name, const char** lowered) {
  static auto* names = new std::set<std::string>;
  *lowered = names->insert(name).first->c_str();
  return 0;
}

// Whatever is made is one zero byte.
#define MADE(name)                          \
  NVRTC(name##Size, void*, size_t* bytes) { \
    *bytes = 1;                             \
    return 0;                               \
  }                                         \
  NVRTC(name, void*, char* made) {          \
    *made = 0;                              \
    return 0;                               \
  }

MADE(nvrtcGetCUBIN)
MADE(nvrtcGetPTX)
MADE(nvrtcGetProgramLog)
