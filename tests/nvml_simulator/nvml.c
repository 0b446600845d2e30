/* A libnvidia-ml.so.1 whose GPUs are emulated GPUs' state files: PERSEUS_SIMULATED_GPUS lists them, separated by ':'.
 * Enough of NVML for pynvml, torch's and Zeus's device code to find, read and control them. Faults, throttling and
 * slow calls are injected through the state file (EmulatedGpu.set_faults, set_cap); with PERSEUS_SIMULATED_UNPRIVILEGED
 * set, this process may not set clocks. By hand:
 *
 *     cc -std=gnu11 -O2 -fPIC -shared -Wl,-soname,libnvidia-ml.so.1 -o /tmp/libnvidia-ml.so.1 nvml.c state.c -lpthread
 *     python -c "from perseus_plugin.gpus.emulated.device import EmulatedGpu as G; G.create('/tmp/gpu0', uuid='GPU-0')"
 *     LD_LIBRARY_PATH=/tmp PERSEUS_SIMULATED_GPUS=/tmp/gpu0 perseus doctor
 */
#define _GNU_SOURCE
#include "state.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, UNSUPPORTED = 3, DENIED = 4, NOT_FOUND = 6, TOO_SMALL = 7,
    DRIVER_NOT_LOADED = 9, LOST = 15,
};
enum { MAX_GPUS = 16, MEMORY_CLOCK_MHZ = 1593, FIELD_CAP_TIME = 74, FIELD_ENERGY = 83, FIELD_POWER_INSTANT = 186 };
enum { VALUE_UINT = 1, VALUE_ULONG_LONG = 3, CLOCK_GRAPHICS = 0, CLOCK_SM = 1, CLOCK_MEMORY = 2 };

typedef struct gpu {
    unsigned index;
    char path[4096];
    struct state *state;
} *nvmlDevice_t;

typedef struct {
    unsigned fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned valueType;
    nvmlReturn_t nvmlReturn;
    union {
        double d;
        unsigned ui;
        unsigned long long ull;
    } value;
} nvmlFieldValue_t;

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

static struct gpu gpus[MAX_GPUS];
static unsigned gpu_count, users;
static pthread_mutex_t start_mutex = PTHREAD_MUTEX_INITIALIZER;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static nvmlReturn_t open_gpu(const char *path) {
    struct gpu *gpu = &gpus[gpu_count];
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd < 0) return DRIVER_NOT_LOADED;
    if (fstat(fd, &status) || status.st_size != (off_t)sizeof *gpu->state) {
        close(fd);
        return DRIVER_NOT_LOADED;
    }
    gpu->state = mmap(NULL, sizeof *gpu->state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (gpu->state == MAP_FAILED) return DRIVER_NOT_LOADED;
    if (memcmp(gpu->state->header.magic, "PERSEUSG", 8) || gpu->state->header.version != STATE_VERSION)
        return DRIVER_NOT_LOADED;
    snprintf(gpu->path, sizeof gpu->path, "%s", path);
    gpu->index = gpu_count++;
    return OK;
}

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    nvmlReturn_t result = OK;
    pthread_mutex_lock(&start_mutex);
    if (!gpu_count) {
        const char *listed = getenv("PERSEUS_SIMULATED_GPUS");
        char *copy = strdup(listed ? listed : ""), *rest = copy;
        for (char *path; result == OK && gpu_count < MAX_GPUS && (path = strsep(&rest, ":"));)
            if (*path) result = open_gpu(path);
        free(copy);
        if (!gpu_count) result = DRIVER_NOT_LOADED;
    }
    if (result == OK) users++;
    pthread_mutex_unlock(&start_mutex);
    return result;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    pthread_mutex_lock(&start_mutex);
    const nvmlReturn_t result = users ? OK : UNINITIALIZED;
    if (users && !--users) /* the next start reads the list again */
        while (gpu_count) munmap(gpus[--gpu_count].state, sizeof(struct state));
    pthread_mutex_unlock(&start_mutex);
    return result;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
        case OK: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case UNSUPPORTED: return "Not Supported";
        case DENIED: return "Insufficient Permissions";
        case NOT_FOUND: return "Not Found";
        case TOO_SMALL: return "Insufficient Size";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}

static nvmlReturn_t text(char *to, unsigned length, const char *from) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(from) >= length) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) { return text(version, length, "999.99"); }
nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) { return text(version, length, "13.999.99"); }

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    *version = 13000;
    return OK;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    *count = gpu_count;
    return users ? OK : UNINITIALIZED;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *gpu) {
    if (!users) return UNINITIALIZED;
    if (index >= gpu_count) return INVALID_ARGUMENT;
    if ((unsigned)gpus[index].state->settings.faults & GPU_LOST) return LOST;
    *gpu = &gpus[index];
    return OK;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *gpu) {
    if (!users) return UNINITIALIZED;
    for (unsigned i = 0; i < gpu_count; i++)
        if (!strcmp(uuid, gpus[i].state->header.uuid)) {
            *gpu = &gpus[i];
            return OK;
        }
    return NOT_FOUND;
}

/* What every call on a GPU begins with: it takes its time, own_s beside what any does, and a lost GPU answers nothing. */
static nvmlReturn_t call(nvmlDevice_t gpu, unsigned *faults, double own_s) {
    if (!users) return UNINITIALIZED;
    if (gpu < gpus || gpu >= gpus + gpu_count) return INVALID_ARGUMENT;
    const double call_s = gpu->state->settings.call_s + own_s;
    if (call_s > 0) {
        const time_t whole = (time_t)call_s;
        nanosleep(&(struct timespec){whole, (long)(1e9 * (call_s - (double)whole))}, NULL);
    }
    *faults = (unsigned)gpu->state->settings.faults;
    return *faults & GPU_LOST ? LOST : OK;
}

static nvmlReturn_t peek_taking(nvmlDevice_t gpu, struct dynamics *d, double own_s) {
    unsigned faults;
    const nvmlReturn_t result = call(gpu, &faults, own_s);
    if (result == OK) {
        state_snapshot(gpu->state, d);
        state_advance(gpu->state, d, now_s());
    }
    return result;
}

static nvmlReturn_t peek(nvmlDevice_t gpu, struct dynamics *d) { return peek_taking(gpu, d, 0.0); }

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t gpu, char *name, unsigned length) {
    return text(name, length, gpu->state->header.name);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t gpu, char *uuid, unsigned length) {
    return text(uuid, length, gpu->state->header.uuid);
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t gpu, unsigned *index) {
    *index = gpu->index;
    return OK;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t gpu, nvmlPciInfo_t *pci) {
    *pci = (nvmlPciInfo_t){.bus = gpu->index + 1};
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", pci->bus);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    return OK;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t gpu, unsigned *current, unsigned *pending) {
    *current = *pending = (unsigned)gpu->state->settings.faults & MIG_ENABLED ? 1 : 0;
    return OK;
}

nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t gpu, unsigned *count, unsigned *clocks) {
    (void)gpu;
    const unsigned room = *count;
    *count = 1;
    if (!clocks || room < 1) return TOO_SMALL;
    clocks[0] = MEMORY_CLOCK_MHZ;
    return OK;
}

nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t gpu, unsigned memory, unsigned *count, unsigned *clocks) {
    if (memory != MEMORY_CLOCK_MHZ) return INVALID_ARGUMENT;
    const unsigned room = *count;
    *count = gpu->state->header.clocks;
    if (!clocks || room < *count) return TOO_SMALL;
    memcpy(clocks, gpu->state->clocks_mhz, *count * sizeof *clocks);
    return OK;
}

static int privileged(unsigned faults) {
    return !(faults & NO_PERMISSION || getenv("PERSEUS_SIMULATED_UNPRIVILEGED"));
}

/* The state advanced to now, under the file's lock, to be changed; -1 if it cannot be locked, else for commit_and_unlock. */
static int lock_and_advance(nvmlDevice_t gpu, struct dynamics *d) {
    const int fd = open(gpu->path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || flock(fd, LOCK_EX)) {
        if (fd >= 0) close(fd);
        return -1;
    }
    state_snapshot(gpu->state, d);
    state_advance(gpu->state, d, now_s());
    return fd;
}

static void commit_and_unlock(nvmlDevice_t gpu, const struct dynamics *d, int fd) {
    state_commit(gpu->state, d);
    close(fd);
}

/* Lock to mhz, or reset (0). Like the driver it takes any clock and rounds it down to a supported one. */
static nvmlReturn_t change_clock(nvmlDevice_t gpu, uint32_t mhz) {
    unsigned faults;
    if (!users) return UNINITIALIZED;
    if (gpu < gpus || gpu >= gpus + gpu_count) return INVALID_ARGUMENT;
    struct state *s = gpu->state;
    nvmlReturn_t result = call(gpu, &faults, s->settings.set_call_s);
    if (result == OK && !privileged(faults)) result = DENIED;
    if (result == OK && faults & NOT_SUPPORTED) result = UNSUPPORTED;
    struct dynamics d;
    const int fd = lock_and_advance(gpu, &d);
    if (fd < 0) return LOST;
    const uint32_t locked = mhz ? s->clocks_mhz[state_index_at_most(s, mhz)] : 0;
    state_log(s, &d, locked, result != OK);
    if (result == OK) {
        const uint32_t target = locked && !(faults & IGNORE_LOCKS) ? locked : s->clocks_mhz[0];
        const double least_s = s->settings.latency_s + state_switch_s(s, &d, target);
        state_change_clock(&d, target, locked, d.at_s + least_s + s->settings.jitter_s * state_draw(&d));
        state_advance(s, &d, d.at_s);
    }
    commit_and_unlock(gpu, &d, fd);
    return result;
}

nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t gpu, unsigned min_mhz, unsigned max_mhz) {
    if (!min_mhz || min_mhz > max_mhz) return INVALID_ARGUMENT;
    return change_clock(gpu, max_mhz);
}

nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t gpu) { return change_clock(gpu, 0); }

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t gpu, unsigned type, unsigned *mhz) {
    struct dynamics d;
    const nvmlReturn_t result = peek(gpu, &d);
    if (result != OK) return result;
    if (type > CLOCK_MEMORY) return UNSUPPORTED;
    *mhz = type == CLOCK_MEMORY ? MEMORY_CLOCK_MHZ : gpu->state->clocks_mhz[state_effective_index(gpu->state, &d)];
    return OK;
}

nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t gpu, unsigned type, unsigned *mhz) {
    *mhz = type == CLOCK_MEMORY ? MEMORY_CLOCK_MHZ : gpu->state->clocks_mhz[0];
    return OK;
}

static nvmlReturn_t peek_energy(nvmlDevice_t gpu, struct dynamics *d) {
    if (!users) return UNINITIALIZED;
    if (gpu < gpus || gpu >= gpus + gpu_count) return INVALID_ARGUMENT;
    return peek_taking(gpu, d, gpu->state->settings.energy_call_s);
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t gpu, unsigned long long *mj) {
    struct dynamics d;
    const nvmlReturn_t result = peek_energy(gpu, &d);
    if (result == OK && (unsigned)gpu->state->settings.faults & NO_COUNTER) return UNSUPPORTED;
    if (result == OK) *mj = (unsigned long long)(1e3 * state_shown_j(gpu->state, &d));
    return result;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t gpu, unsigned *mw) {
    struct dynamics d;
    const nvmlReturn_t result = peek(gpu, &d);
    if (result == OK) *mw = (unsigned)(1e3 * state_power_w(gpu->state, &d));
    return result;
}

static unsigned milliwatts(double watts) { return (unsigned)(1e3 * watts); }

nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t gpu, unsigned *least_mw, unsigned *most_mw) {
    struct dynamics d;
    const nvmlReturn_t result = peek(gpu, &d);
    if (result != OK) return result;
    *least_mw = milliwatts(gpu->state->header.static_w) + 1;
    *most_mw = milliwatts(gpu->state->header.most_w);
    return OK;
}

nvmlReturn_t nvmlDeviceGetPowerManagementLimit(nvmlDevice_t gpu, unsigned *mw) {
    struct dynamics d;
    const nvmlReturn_t result = peek(gpu, &d);
    if (result != OK) return result;
    const double most_w = gpu->state->header.most_w;
    *mw = milliwatts(d.limit_w < most_w ? d.limit_w : most_w);
    return result;
}

nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t gpu, unsigned *mw) {
    return nvmlDeviceGetPowerManagementLimit(gpu, mw);
}

nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t gpu, unsigned mw) {
    struct dynamics d;
    unsigned faults, least_mw, most_mw;
    nvmlReturn_t result = nvmlDeviceGetPowerManagementLimitConstraints(gpu, &least_mw, &most_mw);
    if (result == OK && (mw < least_mw || mw > most_mw)) result = INVALID_ARGUMENT;
    if (result == OK) result = call(gpu, &faults, 0.0);
    if (result == OK && !privileged(faults)) result = DENIED;
    if (result != OK) return result;
    const int fd = lock_and_advance(gpu, &d);
    if (fd < 0) return LOST;
    d.limit_w = 1e-3 * mw;
    commit_and_unlock(gpu, &d, fd);
    return OK;
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t gpu, int count, nvmlFieldValue_t *values) {
    struct dynamics d;
    int energy = 0;
    for (int i = 0; i < count; i++) energy |= values[i].fieldId == FIELD_ENERGY;
    const nvmlReturn_t result = energy ? peek_energy(gpu, &d) : peek(gpu, &d);
    if (result != OK) return result;
    const unsigned faults = (unsigned)gpu->state->settings.faults;
    if (faults & NO_FIELDS) return UNSUPPORTED;
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    for (int i = 0; i < count; i++) {
        nvmlFieldValue_t *v = &values[i];
        v->timestamp = wall.tv_sec * 1000000LL + wall.tv_nsec / 1000;
        v->latencyUsec = 0;
        v->nvmlReturn = OK;
        v->valueType = VALUE_ULONG_LONG;
        if (v->fieldId == FIELD_ENERGY && faults & NO_COUNTER) {
            v->nvmlReturn = UNSUPPORTED;
        } else if (v->fieldId == FIELD_ENERGY) {
            v->value.ull = (unsigned long long)(1e3 * state_shown_j(gpu->state, &d));
        } else if (v->fieldId == FIELD_CAP_TIME) {
            v->value.ull = (unsigned long long)(1e9 * d.capped_s);
        } else if (v->fieldId == FIELD_POWER_INSTANT) {
            v->valueType = VALUE_UINT;
            v->value.ui = (unsigned)(1e3 * state_power_w(gpu->state, &d));
        } else {
            v->nvmlReturn = UNSUPPORTED;
        }
    }
    return OK;
}
