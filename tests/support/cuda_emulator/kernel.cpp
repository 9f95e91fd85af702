// The generated source, unchanged, and the way into it.
#include <cstddef>
#include <utility>

#include "device.h"

#include SOURCE

#define UNCHECKED __attribute__((no_sanitize("kernel-address")))

template <class... P, size_t... I>
UNCHECKED static inline void emulated_call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
  kernel(*(P*)parameters[I]...);
}

template <class... P>
UNCHECKED static inline void emulated_call(void (*kernel)(P...), void** parameters) {
  emulated_call(kernel, parameters, std::index_sequence_for<P...>());
}

extern "C" UNCHECKED void emulated_kernel(void** parameters) {
  emulated_call(ENTRY, parameters);
}
