/* The thread pool of the generated kernels: TVM's parallel loops on the OpenMP pool that torch already runs.
 *
 * Two spinning pools in one process halve each other's speed, so no pool is made here. GOMP_parallel and its kin
 * are looked up in the process instead of linked: whichever OpenMP run time torch loaded is the one used, and a
 * second copy cannot slip in. Where none is found, loops run inline. Function pointers reach the generated shared
 * object through ctypes (ggpass/kernels/cpu/parallel.py); the Python module itself is empty and exists so that
 * Python's import machinery can say where this file lies. */
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

/* The ABI of TVM's c_backend_api.h. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} GroupEnv;
typedef int (*Lambda)(int task_id, GroupEnv *env, void *data);

/* The ABI of libgomp, which LLVM's libomp offers as well. */
typedef struct {
  void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
  int (*max_threads)(void);
  int (*num_threads)(void);
  int (*thread_num)(void);
  int (*in_parallel)(void);
} OpenMP;

typedef struct {
  Lambda lambda;
  void *data;
  int32_t tasks;
  int failed;
} Launch;

static OpenMP omp;
static __thread int inline_only;

static void find_openmp(void) {
  void *parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  omp.max_threads = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  omp.num_threads = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  omp.thread_num = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_get_thread_num");
  omp.in_parallel = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_in_parallel");
  if (omp.max_threads && omp.num_threads && omp.thread_num && omp.in_parallel)
    omp.parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
}

/* A forked child has none of the pool's threads, and OpenMP would wait for them for ever: its loops run inline. */
static void run_inline_in_child(void) { omp.parallel = NULL; }

/* Called once before any launch: 1 when torch's OpenMP was found, 0 when loops will run inline. */
EXPORT int ggpass_parallel_init(void) {
  find_openmp();
  pthread_atfork(NULL, NULL, run_inline_in_child);
  return omp.parallel != NULL;
}

/* With 1, this thread's next launches run inline: waking the pool costs more than a small layer. */
EXPORT void ggpass_parallel_inline(int on) { inline_only = on; }

/* The runtime may grant fewer threads than asked: each then takes every n-th task. */
static void team(void *opaque) {
  Launch *launch = opaque;
  GroupEnv env = {NULL, launch->tasks};
  for (int task = omp.thread_num(); task < launch->tasks; task += omp.num_threads())
    if (launch->lambda(task, &env, launch->data) != 0) __atomic_store_n(&launch->failed, 1, __ATOMIC_RELAXED);
}

/* TVMBackendParallelLaunch: num_task = 0 means one task for each thread of the pool. */
EXPORT int ggpass_parallel_launch(Lambda lambda, void *data, int num_task) {
  int threads = omp.parallel && !inline_only && !omp.in_parallel() ? omp.max_threads() : 1;
  Launch launch = {lambda, data, num_task > 0 ? num_task : threads, 0};
  if (threads > 1 && launch.tasks > 1) {
    omp.parallel(team, &launch, (unsigned)(threads < launch.tasks ? threads : launch.tasks), 0);
    return launch.failed ? -1 : 0;
  }
  GroupEnv env = {NULL, launch.tasks};
  for (int task = 0; task < launch.tasks; task++)
    if (lambda(task, &env, data) != 0) return -1;
  return 0;
}

/* TVMBackendAllocWorkspace and TVMBackendFreeWorkspace: aligned to a cache line. */
EXPORT void *ggpass_workspace_alloc(int device_type, int device_id, uint64_t bytes, int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  void *memory = NULL;
  return posix_memalign(&memory, 64, bytes) == 0 ? memory : NULL;
}

EXPORT int ggpass_workspace_free(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_parallel", NULL, 0, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__parallel(void) { return PyModule_Create(&module); }
