/* Cards that compute nothing: CUDA's runtime and driver and NVML, as far as ONNX Runtime and we call
 * them. Kernels do not run and streams do not wait; memory is counted, can run out, and is filled with
 * PATTERN when it is read back. What this file lacks, `libraries` adds as functions that return 0.
 *
 * CARDS names a file of `struct card`, one per card, which all processes that use them share.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <driver_types.h>
#include <vector_types.h>
#undef cudaGetDeviceProperties

#define NAME "Fake H100"
#define PATTERN 0x3c
#define PAGE 4096ull
#define NVML_NOT_SUPPORTED 3

typedef unsigned long long bytes;

struct card { bytes total, used, kernels; };
struct block { bytes size; struct card *card; };

static struct card *cards;
static int count, failure;
static int captures, broken;    /* under way, which forbid every thread what breaks them, and do break */
static int launch;              /* microseconds that a kernel takes to launch */
static bytes *mine;             /* what this process has of each */
static const void *counter;     /* memory that was set to a value, to be read back as it is */
static __thread int current, capturing;

__attribute__((constructor)) static void find(void) {
    const char *path = getenv("CARDS"), *microseconds = getenv("CARD_LAUNCH");
    launch = microseconds ? atoi(microseconds) : 0;
    int file = path ? open(path, O_RDWR) : -1;
    struct stat found;
    if (file < 0 || fstat(file, &found)) return;
    cards = mmap(0, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    count = found.st_size / sizeof *cards;
    mine = calloc(count, sizeof *mine);
    close(file);
}

__attribute__((destructor)) static void give_back(void) {
    for (int number = 0; number < count; number++) __sync_fetch_and_sub(&cards[number].used, mine[number]);
}

/* What calls answer that a capture forbids to all threads, and those that it forbids to its own */
static int unsafe(void) {
    if (!captures) return failure;
    broken = 1;
    return cudaErrorStreamCaptureUnsupported;
}
static int waiting(void) { return capturing ? cudaErrorStreamCaptureUnsupported : failure; }

/* Memory */

static int take(void **out, bytes wanted) {
    bytes size = (wanted + 2 * PAGE - 1) / PAGE * PAGE;
    struct card *card = cards + current;
    int error = unsafe();
    if (error) return error;
    if (__sync_add_and_fetch(&card->used, size) <= card->total) {
        struct block *block = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (block != MAP_FAILED) {
            __sync_fetch_and_add(&mine[current], size);
            *block = (struct block){size, card};
            *out = (char *)block + PAGE;
            return cudaSuccess;
        }
    }
    __sync_fetch_and_sub(&card->used, size);
    return cudaErrorMemoryAllocation;
}

static int drop(void *memory) {
    int error = memory ? unsafe() : cudaSuccess;
    if (!memory || error) return error;
    struct block block = *(struct block *)((char *)memory - PAGE);
    munmap((char *)memory - PAGE, block.size);
    __sync_fetch_and_sub(&block.card->used, block.size);
    __sync_fetch_and_sub(&mine[block.card - cards], block.size);
    return failure;
}

static int copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (failure) return failure;
    if (kind == cudaMemcpyDeviceToHost && from != counter) memset(to, PATTERN, size);
    else memmove(to, from, size);
    if (from == counter) counter = 0;
    return cudaSuccess;
}

static int fill(void *memory, int value, size_t size) {
    memset(memory, value, size);
    counter = memory;
    return failure;
}

cudaError_t cudaMalloc(void **out, size_t size) { return take(out, size); }
cudaError_t cudaMallocFromPoolAsync(void **out, size_t size, cudaMemPool_t pool, cudaStream_t stream) { return take(out, size); }
cudaError_t cudaFree(void *memory) { return drop(memory); }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { return drop(memory); }
cudaError_t cudaMallocHost(void **out, size_t size) {
    int error = unsafe();
    return error ? error : posix_memalign(out, PAGE, size + 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) { return cudaMallocHost(out, size); }
cudaError_t cudaFreeHost(void *memory) { free(memory); return failure; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = cards[current].total;
    *left = *total - cards[current].used;
    return failure;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    int error = unsafe();
    return error ? error : copy(to, from, size, kind);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { return copy(to, from, size, kind); }
cudaError_t cudaMemset(void *memory, int value, size_t size) { return fill(memory, value, size); }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) { return fill(memory, value, size); }
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, enum cudaMemcpyKind kind) {
    memset(to, 0, size);
    return failure;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *memory) {
    *found = (struct cudaPointerAttributes){.type = cudaMemoryTypeDevice, .devicePointer = (void *)memory};
    return failure;
}

/* Devices */

cudaError_t cudaGetDeviceCount(int *found) { *found = count; return failure; }
cudaError_t cudaGetDevice(int *device) { *device = current; return failure; }
cudaError_t cudaSetDevice(int device) { current = device; return failure; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return failure; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return failure; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    *found = (struct cudaDeviceProp){
        .name = NAME, .totalGlobalMem = cards[device].total, .major = 9, .multiProcessorCount = 132, .warpSize = 32,
        .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
        .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32, .regsPerBlock = 65536,
        .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472,
        .l2CacheSize = 50 << 20,
    };
    return failure;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp of;
    cudaGetDeviceProperties(&of, device);
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? of.major
        : attribute == cudaDevAttrMultiProcessorCount ? of.multiProcessorCount
        : attribute == cudaDevAttrMaxSharedMemoryPerBlock ? (int)of.sharedMemPerBlock
        : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)of.sharedMemPerBlockOptin
        : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? (int)of.sharedMemPerMultiprocessor : 0;
    return failure;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .binaryVersion = 90, .ptxVersion = 90};
    return failure;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned flags) {
    *blocks = 2;
    return failure;
}

/* Streams: what is asked for has happened. */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = malloc(1); return failure; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return failure; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = malloc(1); return failure; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return failure; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waiting(); }
cudaError_t cudaDeviceSynchronize(void) { return unsafe(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waiting(); }
cudaError_t cudaGetLastError(void) { return failure; }
cudaError_t cudaPeekAtLastError(void) { return failure; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *data) { function(data); return failure; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorLaunchFailure"; }
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "unspecified launch failure"; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = capturing; return failure; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    __sync_fetch_and_add(&captures, 1);
    capturing = 1;
    return failure;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    usleep(20000);  /* so that others get in the way who are let */
    __sync_fetch_and_sub(&captures, 1);
    capturing = 0;
    *graph = malloc(1);
    return __sync_bool_compare_and_swap(&broken, 1, 0) ? cudaErrorStreamCaptureInvalidated : failure;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, bytes flags) { *ready = malloc(1); return failure; }

/* Once destroyed ones of a broken card fail, ONNX Runtime ends the process. */
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) { return failure; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) { return failure; }

static int launched(void) {
    __sync_fetch_and_add(&cards[current].kernels, 1);
    if (launch && !capturing) usleep(launch);
    return failure;
}
cudaError_t __cudaLaunchKernel(void) { return launched(); }
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launched(); }

/* The driver: its one kernel breaks the card for this process. */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, bytes flags, enum cudaDriverEntryPointQueryResult *found) {
    *function = 0;
    if (found) *found = cudaDriverEntryPointSymbolNotFound;
    return failure;
}
int cuInit(unsigned flags) { return failure; }
int cuDevicePrimaryCtxRetain(void **context, int device) { current = device; *context = malloc(1); return failure; }
int cuModuleLoadData(void **module, const void *image) { *module = malloc(1); return failure; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = malloc(1); return failure; }
int cuLaunchKernel(void) { failure = cudaErrorLaunchFailure; return 0; }
int cuMemAlloc_v2(void **out, size_t size) { return take(out, size); }

/* NVML */

const char *nvmlErrorString(int error) { return "Not Supported"; }
int nvmlDeviceGetCount_v2(unsigned *found) { *found = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct card **card) { *card = cards + index; return 0; }
int nvmlDeviceGetName(struct card *card, char *out, unsigned size) { strcpy(out, NAME); return 0; }
int nvmlDeviceGetUUID(struct card *card, char *out, unsigned size) { strcpy(out, "GPU-0"); out[4] += card - cards; return 0; }
int nvmlDeviceGetMigMode(struct card *card, unsigned *now, unsigned *later) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceIsMigDeviceHandle(struct card *card, unsigned *is) { *is = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(struct card *card, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetUtilizationRates(struct card *card, unsigned *rates) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetPowerUsage(struct card *card, unsigned *milliwatts) { return NVML_NOT_SUPPORTED; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strcpy(out, "580.1"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetMemoryInfo(struct card *card, bytes *found) {
    found[0] = card->total;
    found[1] = card->total - card->used;
    found[2] = card->used;
    return 0;
}
