// Errors inside the library are C++ exceptions; none crosses into ONNX Runtime, where they become statuses.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "ort_abi.h"

namespace ggpass {

// What is wrong, why, and what to do: the text of the status.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws a Failure with a text in the manner of printf.
[[noreturn]] inline void __attribute__((format(printf, 1, 2))) fail(const char *format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Failure(text);
}

// Throws where ONNX Runtime reports an error of its own.
inline void check(const OrtApi &api, OrtStatus *status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Failure(message);
}

// Runs `body` and turns what it throws into a status that begins with `where`.
template <typename Body>
OrtStatus *guard(const OrtApi &api, const std::string &where, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc &) {
    return api.CreateStatus(ORT_FAIL, "[ggpass] out of memory; run smaller batches, or free some memory");
  } catch (const std::exception &error) {
    try {
      return api.CreateStatus(ORT_INVALID_ARGUMENT, ("[ggpass] " + where + ": " + error.what()).c_str());
    } catch (const std::bad_alloc &) {
      return api.CreateStatus(ORT_FAIL, "[ggpass] out of memory");
    }
  }
}

}  // namespace ggpass
