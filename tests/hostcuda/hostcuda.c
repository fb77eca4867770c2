/* A stand-in for the CUDA runtime in host memory, for testing CuPy's own memory pools on a machine without a GPU.
 *
 * Device memory is host memory, 512-byte aligned, of a fixed capacity on each of two devices. Copies are checked against
 * the ends of allocations. Everything runs at once, except that a test can hold a stream: events recorded on a held stream
 * are not complete until it is released or waited for, which is how delayed frees are tested.
 * No kernels, arrays, textures, graphs, IPC or asynchronous pools: those return cudaErrorNotSupported.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEVICES 2
#define ALIGNMENT 512
#define DEFAULT_CAPACITY ((size_t)1 << 30)

typedef struct { char *at; size_t size; int device; enum cudaMemoryType type; int ours; } Allocation;
typedef struct Stream { unsigned flags; int priority; int held; int capturing; unsigned long released; } Stream;
typedef struct { Stream *stream; unsigned long needs; double time_s; int recorded; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Allocation *allocations;
static size_t count, room;
static size_t capacity[DEVICES] = {DEFAULT_CAPACITY, DEFAULT_CAPACITY};
static size_t used[DEVICES], peak[DEVICES], pinned;
static long fail_in = -1; /* allocations until one fails; -1: none */
static Stream builtin_streams[3];
static struct { Stream *waiter, *source; } waits[4096]; /* the latest waits of streams for events */
static unsigned long waited;
static __thread int current_device;
static __thread cudaError_t last_error;

static cudaError_t fail(cudaError_t error) { return last_error = error; }

/* The streams that CUDA names by number: 0 default, 1 legacy, 2 per-thread. */
static Stream *stream_of(cudaStream_t handle) {
  return (uintptr_t)handle <= 2 ? &builtin_streams[(uintptr_t)handle] : (Stream *)handle;
}

static double now_s(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static Allocation *find(const void *pointer) {
  const char *p = pointer;
  for (size_t i = count; i-- > 0;)
    if (p >= allocations[i].at && (p < allocations[i].at + allocations[i].size || p == allocations[i].at)) return &allocations[i];
  return NULL;
}

static cudaError_t enter(char *at, size_t size, enum cudaMemoryType type, int ours) {
  if (count == room) {
    size_t wanted = room ? 2 * room : 64;
    Allocation *grown = realloc(allocations, wanted * sizeof *grown);
    if (!grown) return cudaErrorMemoryAllocation;
    allocations = grown;
    room = wanted;
  }
  allocations[count++] = (Allocation){at, size, current_device, type, ours};
  return cudaSuccess;
}

static cudaError_t allocate(void **out, size_t size, enum cudaMemoryType type) {
  cudaError_t status = cudaErrorMemoryAllocation;
  int on_device = type != cudaMemoryTypeHost;
  pthread_mutex_lock(&lock);
  int injected = fail_in >= 0 && fail_in-- == 0;
  if (!injected && !(on_device && used[current_device] + size > capacity[current_device])) {
    void *at = NULL;
    if (posix_memalign(&at, ALIGNMENT, size ? size : 1) == 0) {
      status = enter(at, size, type, 1);
      if (status == cudaSuccess) {
        *out = at;
        if (!on_device) pinned += size;
        else if ((used[current_device] += size) > peak[current_device]) peak[current_device] = used[current_device];
      } else free(at);
    }
  }
  pthread_mutex_unlock(&lock);
  return fail(status);
}

static cudaError_t release(void *pointer, int ours) {
  cudaError_t status = cudaErrorInvalidValue;
  if (!pointer && ours) return cudaSuccess;
  pthread_mutex_lock(&lock);
  Allocation *found = find(pointer);
  if (found && found->at == pointer && found->ours == ours) {
    if (ours) {
      if (found->type == cudaMemoryTypeHost) pinned -= found->size;
      else used[found->device] -= found->size;
      free(found->at);
    }
    *found = allocations[--count];
    status = cudaSuccess;
  }
  pthread_mutex_unlock(&lock);
  return fail(status);
}

/* Whether [pointer, pointer + size) may be read or written as device (or any) memory. */
static int reachable(const void *pointer, size_t size, int must_be_device) {
  Allocation *found = find(pointer);
  if (!found) return !must_be_device;
  if (must_be_device && found->type == cudaMemoryTypeHost) return 0;
  return (size_t)((const char *)pointer - found->at) + size <= found->size;
}

static cudaError_t copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                        enum cudaMemcpyKind kind) {
  int to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  int from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (!width || !rows) return fail(cudaSuccess);
  pthread_mutex_lock(&lock);
  int good = reachable(to, (rows - 1) * to_pitch + width, to_device) && reachable(from, (rows - 1) * from_pitch + width, from_device);
  pthread_mutex_unlock(&lock);
  if (!good) return fail(cudaErrorInvalidValue);
  for (size_t row = 0; row < rows; row++) memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return fail(cudaSuccess);
}

/* ---- controls for tests, called through ctypes ---- */
void hostcuda_set_capacity(int device, size_t nbytes) { capacity[device] = nbytes; }
size_t hostcuda_used(int device) { return used[device]; }
size_t hostcuda_peak(int device) { return peak[device]; }
size_t hostcuda_pinned(void) { return pinned; }
void hostcuda_reset_peak(void) { for (int i = 0; i < DEVICES; i++) peak[i] = used[i]; }
/* The n-th allocation from now fails (0: the next one); -1: none does. */
void hostcuda_fail_allocation(long n) { fail_in = n; }
/* From now on, what is recorded on the stream stays incomplete until released. */
void hostcuda_hold_stream(uintptr_t handle) { stream_of((cudaStream_t)handle)->held = 1; }
void hostcuda_release_stream(uintptr_t handle) {
  Stream *stream = stream_of((cudaStream_t)handle);
  stream->held = 0;
  stream->released++;
}

/* How often `waiter` was told to wait for work of `source`, of the last 4096 waits. */
long hostcuda_waits(uintptr_t waiter, uintptr_t source) {
  long found = 0;
  for (unsigned long i = waited > 4096 ? waited - 4096 : 0; i < waited; i++)
    found += waits[i % 4096].waiter == stream_of((cudaStream_t)waiter) && waits[i % 4096].source == stream_of((cudaStream_t)source);
  return found;
}
void hostcuda_capture(uintptr_t handle, int on) { stream_of((cudaStream_t)handle)->capturing = on; }

/* ---- errors, versions, devices ---- */
const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "reported by the host-memory stand-in for CUDA";
}
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 12090; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 12090; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *devices) { *devices = DEVICES; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  for (int i = 0; i < 3; i++) hostcuda_release_stream((uintptr_t)i);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= DEVICES) return fail(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  if (device < 0 || device >= DEVICES) return fail(cudaErrorInvalidDevice);
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "host memory");
  properties->totalGlobalMem = capacity[device];
  properties->major = 8;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->multiProcessorCount = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = device != peer; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceDisablePeerAccess(int peer) { return cudaSuccess; }
cudaError_t cudaDeviceGetLimit(size_t *value, enum cudaLimit limit) { *value = 0; return cudaSuccess; }
cudaError_t cudaDeviceSetLimit(enum cudaLimit limit, size_t value) { return cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* ---- memory ---- */
cudaError_t cudaMalloc(void **out, size_t size) { return allocate(out, size, cudaMemoryTypeDevice); }
cudaError_t cudaMallocManaged(void **out, size_t size, unsigned flags) { return allocate(out, size, cudaMemoryTypeManaged); }
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) { return allocate(out, size, cudaMemoryTypeHost); }
cudaError_t cudaFree(void *pointer) { return release(pointer, 1); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer, 1); }
cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  pthread_mutex_lock(&lock);
  cudaError_t status = find(pointer) ? cudaErrorInvalidValue : enter(pointer, size, cudaMemoryTypeHost, 0);
  pthread_mutex_unlock(&lock);
  return fail(status);
}
cudaError_t cudaHostUnregister(void *pointer) { return release(pointer, 0); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = capacity[current_device];
  *unused = capacity[current_device] > used[current_device] ? capacity[current_device] - used[current_device] : 0;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  pthread_mutex_lock(&lock);
  Allocation *found = find(pointer);
  int host = found && found->type == cudaMemoryTypeHost;
  attributes->type = found ? found->type : cudaMemoryTypeUnregistered;
  attributes->device = found ? found->device : -2;
  attributes->devicePointer = found ? (void *)pointer : NULL;
  attributes->hostPointer = host || !found ? (void *)pointer : NULL;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, size, from, size, size, 1, kind); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, size, from, size, size, 1, kind);
}
cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t size) {
  return copy(to, size, from, size, size, 1, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t stream) {
  return copy(to, size, from, size, size, 1, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, enum cudaMemcpyKind kind) {
  return copy(to, to_pitch, from, from_pitch, width, rows, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, to_pitch, from, from_pitch, width, rows, kind);
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
  pthread_mutex_lock(&lock);
  int good = reachable(to, size, 1);
  pthread_mutex_unlock(&lock);
  if (!good) return fail(cudaErrorInvalidValue);
  memset(to, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { return cudaMemset(to, value, size); }
cudaError_t cudaMemAdvise(const void *pointer, size_t size, enum cudaMemoryAdvise advice, int device) { return cudaSuccess; }
cudaError_t cudaMemPrefetchAsync(const void *pointer, size_t size, int device, cudaStream_t stream) { return cudaSuccess; }

/* ---- streams and events ---- */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  if (!stream) return fail(cudaErrorMemoryAllocation);
  stream->flags = flags;
  stream->priority = priority;
  *out = (cudaStream_t)stream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
/* A destroyed stream is never freed: an event may still point at it, and tests make few. */
cudaError_t cudaStreamDestroy(cudaStream_t handle) { hostcuda_release_stream((uintptr_t)handle); return cudaSuccess; }
cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags) { *flags = stream_of(handle)->flags; return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) { *priority = stream_of(handle)->priority; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t handle) { hostcuda_release_stream((uintptr_t)handle); return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t handle) { return stream_of(handle)->held ? fail(cudaErrorNotReady) : cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  pthread_mutex_lock(&lock);
  waits[waited % 4096].waiter = stream_of(handle);
  waits[waited++ % 4096].source = ((Event *)event)->stream;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  *status = stream_of(handle)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback, void *data, unsigned flags) {
  callback(handle, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  Event *event = calloc(1, sizeof *event);
  if (!event) return fail(cudaErrorMemoryAllocation);
  *out = (cudaEvent_t)event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) { free(handle); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  Event *event = (Event *)handle;
  Stream *stream = stream_of(on);
  event->stream = stream;
  event->needs = stream->released + (stream->held ? 1 : 0);
  event->recorded = 1;
  event->time_s = now_s();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  return event->recorded && event->stream->released < event->needs ? fail(cudaErrorNotReady) : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  if (event->recorded && event->stream->released < event->needs) {
    event->stream->held = 0;
    event->stream->released++;
  }
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = (float)(1e3 * (((Event *)end)->time_s - ((Event *)start)->time_s));
  return cudaSuccess;
}

/* ---- what is not there ---- */
__attribute__((used)) cudaError_t hostcuda_unsupported(void) { return fail(cudaErrorNotSupported); }
#define UNSUPPORTED(name) __asm__(".globl " #name "\n.set " #name ", hostcuda_unsupported")
UNSUPPORTED(cudaCreateSurfaceObject); UNSUPPORTED(cudaCreateTextureObject); UNSUPPORTED(cudaDestroySurfaceObject);
UNSUPPORTED(cudaDestroyTextureObject); UNSUPPORTED(cudaGetTextureObjectResourceDesc); UNSUPPORTED(cudaGetTextureObjectTextureDesc);
UNSUPPORTED(cudaGetChannelDesc); UNSUPPORTED(cudaFreeArray); UNSUPPORTED(cudaMalloc3DArray); UNSUPPORTED(cudaMallocArray);
UNSUPPORTED(cudaMemcpy2DFromArray); UNSUPPORTED(cudaMemcpy2DFromArrayAsync); UNSUPPORTED(cudaMemcpy2DToArray);
UNSUPPORTED(cudaMemcpy2DToArrayAsync); UNSUPPORTED(cudaMemcpy3D); UNSUPPORTED(cudaMemcpy3DAsync);
UNSUPPORTED(cudaGraphDebugDotPrint); UNSUPPORTED(cudaGraphDestroy); UNSUPPORTED(cudaGraphExecDestroy); UNSUPPORTED(cudaGraphInstantiate);
UNSUPPORTED(cudaGraphLaunch); UNSUPPORTED(cudaGraphUpload); UNSUPPORTED(cudaStreamBeginCapture); UNSUPPORTED(cudaStreamEndCapture);
UNSUPPORTED(cudaIpcCloseMemHandle); UNSUPPORTED(cudaIpcGetEventHandle); UNSUPPORTED(cudaIpcGetMemHandle);
UNSUPPORTED(cudaIpcOpenEventHandle); UNSUPPORTED(cudaIpcOpenMemHandle); UNSUPPORTED(cudaDeviceGetByPCIBusId);
UNSUPPORTED(cudaDeviceGetPCIBusId); UNSUPPORTED(cudaDeviceGetDefaultMemPool); UNSUPPORTED(cudaDeviceGetMemPool);
UNSUPPORTED(cudaDeviceSetMemPool); UNSUPPORTED(cudaMallocAsync); UNSUPPORTED(cudaMallocFromPoolAsync); UNSUPPORTED(cudaFreeAsync);
UNSUPPORTED(cudaMemPoolCreate); UNSUPPORTED(cudaMemPoolDestroy); UNSUPPORTED(cudaMemPoolGetAttribute);
UNSUPPORTED(cudaMemPoolSetAttribute); UNSUPPORTED(cudaMemPoolTrimTo);
