/* A libcuda.so.1 that runs nothing, for launching compiled kernels on a machine without a GPU.
 *
 * Tensor maps and launches are held against what the driver API documents, and the first thing that is wrong is kept in words;
 * everything else that Triton asks of a driver is answered as an H100 would. Only Triton's own entry points are here.
 */
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SHARED_PER_BLOCK 232448
#define SHARED_PER_SM 233472

static char why[256];
static long launches, maps;
static unsigned grid[3], threads, shared;

const char *drivercuda_why(void) { return why; }
long drivercuda_launches(void) { return launches; }
long drivercuda_maps(void) { return maps; }
unsigned drivercuda_grid(int axis) { return grid[axis]; }
unsigned drivercuda_threads(void) { return threads; }
unsigned drivercuda_shared(void) { return shared; }

static CUresult refuse(const char *what) {
  snprintf(why, sizeof why, "%s", what);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = why[0] ? why : "an error of the stand-in driver";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_PER_BLOCK; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_PER_SM; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 1000;
  }
  return CUDA_SUCCESS;
}

#undef cuDevicePrimaryCtxRetain
#undef cuCtxGetLimit
#undef cuCtxSetLimit
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)image; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)8;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > SHARED_PER_BLOCK) return refuse("shared memory of a function");
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

static unsigned element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

static unsigned swizzle_bytes(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: return UINT32_MAX;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned bytes = element_bytes(type);
  if ((uintptr_t)map % 64) return refuse("tensor map: the map is not aligned to 64 bytes");
  if ((uintptr_t)address % 16) return refuse("tensor map: the address is not aligned to 16 bytes");
  if (rank < 1 || rank > 5) return refuse("tensor map: rank");
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32)) return refuse("tensor map: a size is 0 or beyond 2^32");
    if (box[i] == 0 || box[i] > 256) return refuse("tensor map: a side of the box is 0 or beyond 256");
    if (steps[i] == 0 || steps[i] > 8) return refuse("tensor map: element strides");
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (strides[i] % 16 || strides[i] >= (1ull << 40)) return refuse("tensor map: a stride is no multiple of 16 bytes below 2^40");
    if (strides[i] < sizes[0] * bytes) return refuse("tensor map: rows overlap");
  }
  if (box[0] * bytes % 16) return refuse("tensor map: the inner side of the box is no multiple of 16 bytes");
  if (box[0] * bytes > swizzle_bytes(swizzle)) return refuse("tensor map: the inner side of the box is beyond the swizzle");
  memset(map, 0, sizeof *map);
  maps++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  grid[0] = config->gridDimX, grid[1] = config->gridDimY, grid[2] = config->gridDimZ;
  threads = config->blockDimX, shared = config->sharedMemBytes;
  if (!grid[0] || !grid[1] || !grid[2]) return refuse("launch: an empty grid");
  if (grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535) return refuse("launch: the grid is too large");
  if (!threads || threads > 1024) return refuse("launch: threads of a block");
  if (shared > SHARED_PER_BLOCK) return refuse("launch: shared memory of a block");
  launches++;
  return CUDA_SUCCESS;
}
