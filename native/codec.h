// The C interface of ggpass._codec: entropy coding of integer symbols, called through ctypes without the GIL.
//
// Every function is re-entrant, allocates nothing and trusts nothing: whatever bytes a decoder is given, it reads
// and writes only inside the buffers whose sizes it was told, and answers with a Status.

#ifndef GGPASS_CODEC_H
#define GGPASS_CODEC_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the stored form is little-endian, and so is every machine this was written for"
#endif

#if defined(__GNUC__)
#define GGP_API extern "C" __attribute__((visibility("default")))
#else
#define GGP_API extern "C"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define GGP_X86 1
#else
#define GGP_X86 0
#endif

enum Status : int64_t {
  kOk = 0,
  kTruncated = -1,  // the input ends before the last symbol
  kCorrupt = -2,    // the input cannot have come from the encoder
  kNoSpace = -3,    // the output buffer is too small
  kArgument = -4,   // the caller broke the contract: a table that does not sum up, a symbol outside its alphabet
};

// How an element of an integer array is stored; the numbers are part of the stored form.
enum IntegerType : int { kU8 = 0, kI8 = 1, kU16 = 2, kI16 = 3, kU32 = 4, kI32 = 5, kU64 = 6, kI64 = 7 };

#endif
