// A libcuda.so.1 without a GPU: it answers as it is told to, refuses what a driver refuses, and records launches.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { DEVICES = 4, MODULES = 4096, NAME = 128, LAUNCHES = 4096, BYTES = 512 };

typedef struct { char name[NAME]; int major, minor, shared; } Device;
typedef struct { const unsigned char *image; size_t size; int device; } Module;
typedef struct { char name[NAME]; int device, dynamic; } Function;
typedef struct {
  char name[NAME];
  unsigned grid[3], block, shared;
  int device;
  uint64_t stream, size;
  unsigned char parameters[BYTES];
} Launch;

static int version = 13000, count = 1, init_code, capturing;
static Device devices[DEVICES] = {{"Stub GPU", 9, 0, 232448}, {"Stub GPU", 9, 0, 232448}};
static Module modules[MODULES];
static Function functions[MODULES];
static int n_modules, n_functions, n_launches;
static Launch launches[LAUNCHES];
static char fail_call[NAME];
static int fail_code;
static void (*on_launch)(const Launch *);
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int contexts[DEVICES];
static _Thread_local void *stack[16];
static _Thread_local int depth;

void stub_version(int value) { version = value; }
void stub_init(int code) { init_code = code; }
void stub_count(int value) { count = value; }
void stub_capturing(int value) { capturing = value; }
void stub_device(int i, const char *name, int major, int minor, int shared) {
  snprintf(devices[i].name, NAME, "%s", name);
  devices[i].major = major, devices[i].minor = minor, devices[i].shared = shared;
}
void stub_fail(const char *call, int code) { snprintf(fail_call, NAME, "%s", call), fail_code = code; }
void stub_on_launch(void (*hook)(const Launch *)) { on_launch = hook; }
int stub_launches(void) { return n_launches; }
int stub_modules(void) { return n_modules; }
int stub_depth(void) { return depth; }
const Launch *stub_launch(int i) { return &launches[i]; }

#define CALL(name)                                                  \
  do {                                                              \
    if (strcmp(fail_call, name) == 0 && fail_code) return fail_code; \
  } while (0)

int cuInit(unsigned flags) { (void)flags; return init_code; }
int cuDriverGetVersion(int *out) { CALL("cuDriverGetVersion"); *out = version; return 0; }
int cuDeviceGetCount(int *out) { CALL("cuDeviceGetCount"); *out = count; return 0; }
int cuDeviceGet(int *out, int index) {
  if (index < 0 || index >= count) return 101;
  *out = index;
  return 0;
}
int cuDeviceGetName(char *out, int size, int device) { snprintf(out, size, "%s", devices[device].name); return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
  if (attribute == 75) *out = devices[device].major;
  else if (attribute == 76) *out = devices[device].minor;
  else if (attribute == 97) *out = devices[device].shared;
  else return 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int device) {
  CALL("cuDevicePrimaryCtxRetain");
  *out = &contexts[device];
  return 0;
}
int cuCtxGetCurrent(void **out) { *out = depth ? stack[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(void **out) {
  if (!depth) return 201;
  *out = stack[--depth];
  return 0;
}
static int current_device(void) { return depth ? (int)((int *)stack[depth - 1] - contexts) : -1; }

// A cubin says in its header which architecture and which release of the ELF format it is.
int cuModuleLoadData(void **out, const void *image) {
  CALL("cuModuleLoadData");
  if (capturing) return 900;
  const unsigned char *bytes = image;
  if (memcmp(bytes, "\x7f" "ELF", 4) != 0) return 200;
  if (bytes[8] >= 8 && version < 13000) return 200;
  uint32_t flags;
  uint64_t sections;
  uint16_t size, number;
  memcpy(&flags, bytes + 48, 4), memcpy(&sections, bytes + 40, 8), memcpy(&size, bytes + 58, 2), memcpy(&number, bytes + 60, 2);
  int built = bytes[8] >= 8 ? (flags >> 8) & 0xff : flags & 0xff, device = current_device();
  if (device < 0) return 201;
  if (built / 10 != devices[device].major || built % 10 > devices[device].minor) return 209;
  pthread_mutex_lock(&mutex);
  modules[n_modules] = (Module){bytes, sections + (uint64_t)size * number, device};
  *out = &modules[n_modules++];
  pthread_mutex_unlock(&mutex);
  return 0;
}
int cuModuleGetFunction(void **out, void *module, const char *name) {
  CALL("cuModuleGetFunction");
  Module *from = module;
  if (!memmem(from->image, from->size, name, strlen(name) + 1)) return 500;
  pthread_mutex_lock(&mutex);
  Function *made = &functions[n_functions++];
  pthread_mutex_unlock(&mutex);
  snprintf(made->name, NAME, "%s", name);
  made->device = from->device, made->dynamic = 48 << 10;
  *out = made;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  CALL("cuFuncSetAttribute");
  Function *f = function;
  if (attribute != 8 || value > devices[f->device].shared) return 1;
  f->dynamic = value;
  return 0;
}
int cuStreamIsCapturing(void *stream, int *out) { (void)stream; *out = capturing; return 0; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  CALL("cuLaunchKernel");
  Function *f = function;
  if (current_device() != f->device) return 201;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || (int)shared > f->dynamic) return 1;
  if (parameters || (uint64_t)extra[0] != 1 || (uint64_t)extra[2] != 2 || extra[4]) return 1;
  pthread_mutex_lock(&mutex);
  Launch *launch = &launches[n_launches++ % LAUNCHES];
  pthread_mutex_unlock(&mutex);
  memset(launch, 0, sizeof *launch);
  snprintf(launch->name, NAME, "%s", f->name);
  launch->grid[0] = gx, launch->grid[1] = gy, launch->grid[2] = gz, launch->block = bx, launch->shared = shared;
  launch->device = f->device, launch->stream = (uint64_t)stream, launch->size = *(size_t *)extra[3];
  memcpy(launch->parameters, extra[1], launch->size < BYTES ? launch->size : BYTES);
  if (on_launch) on_launch(launch);
  return 0;
}
int cuGetErrorName(int code, const char **out) {
  static const struct { int code; const char *name; } names[] = {
      {1, "CUDA_ERROR_INVALID_VALUE"},   {100, "CUDA_ERROR_NO_DEVICE"},          {200, "CUDA_ERROR_INVALID_IMAGE"},
      {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {500, "CUDA_ERROR_NOT_FOUND"},
      {719, "CUDA_ERROR_LAUNCH_FAILED"}, {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}};
  for (unsigned i = 0; i < sizeof names / sizeof *names; ++i)
    if (names[i].code == code) return *out = names[i].name, 0;
  return 1;
}
int cuGetErrorString(int code, const char **out) {
  if (code > 900) return 1;
  *out = "words of the stub";
  return 0;
}
