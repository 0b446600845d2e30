/* The state file of an emulated GPU, as perseus_plugin/gpus/emulated/state.py lays it out, and its arithmetic, as in
 * dynamics.py beside it. Little-endian, all fields naturally aligned. */
#ifndef PERSEUS_STATE_H
#define PERSEUS_STATE_H

#include <stdint.h>

enum { MAX_CLOCKS = 256, LOAD_CLASSES = 4, MAX_PENDING = 8, LOG_CAPACITY = 4096, STATE_VERSION = 3 };
enum { NO_PERMISSION = 1, NOT_SUPPORTED = 2, GPU_LOST = 4, IGNORE_LOCKS = 8, MIG_ENABLED = 16,
       NO_COUNTER = 32, NO_FIELDS = 64 };

struct header {
    char magic[8];
    uint32_t version, clocks, load_classes, log_capacity;
    char boot_id[40], uuid[64], name[96];
    double tick_period_s, tick_window_s, tick_origin_s, dynamic_w[LOAD_CLASSES], static_w;
    double tick_lag_s, most_w, limit_w, burst_j;
};

struct settings {
    double latency_s, jitter_s, set_call_s, energy_call_s, call_s, faults;
};

struct pending {
    double at_s;
    uint32_t mhz, unused;
};

struct dynamics {
    double at_s, energy_j, counter_j, window_j, capped_s, static_w, dynamic_w;
    double work_s, done_s, started_s, finished_s, limit_w, spare_j, tick_j;
    double slowdown[LOAD_CLASSES];
    int64_t ticks;
    uint64_t work_id, log_count, random;
    uint32_t load, clock_mhz, locked_mhz, cap_mhz, pending_count, unused;
    struct pending pending[MAX_PENDING];
};

struct log_entry {
    double time_s;
    uint32_t mhz, pid, refused, unused;
};

struct state {
    union {
        struct header header;
        char header_bytes[512];
    };
    union {
        struct settings settings;
        char settings_bytes[512];
    };
    uint32_t clocks_mhz[MAX_CLOCKS];
    double stretch[LOAD_CLASSES][MAX_CLOCKS];
    double relative_power[LOAD_CLASSES][MAX_CLOCKS];
    double rise_s[MAX_CLOCKS], drop_s[MAX_CLOCKS];
    union {
        uint64_t generation;
        char generation_bytes[64];
    };
    union {
        struct dynamics dynamics;
        char slot_bytes[512];
    } slots[2];
    struct log_entry log[LOG_CAPACITY];
};

/* Index of the highest clock not above mhz, or of the lowest. */
unsigned state_index_at_most(const struct state *s, uint32_t mhz);
/* The clock the GPU runs at. */
unsigned state_effective_index(const struct state *s, const struct dynamics *d);
double state_power_w(const struct state *s, const struct dynamics *d);
/* What whoever reads the energy counter sees. */
double state_shown_j(const struct state *s, const struct dynamics *d);
/* How long a change to mhz takes beyond the least one, from the clock asked for last. */
double state_switch_s(const struct state *s, const struct dynamics *d, uint32_t mhz);
void state_advance(const struct state *s, struct dynamics *d, double to_s);
/* Let the clock become mhz at takes_effect_s, in the order of the calls. */
void state_change_clock(struct dynamics *d, uint32_t mhz, uint32_t locked_mhz, double takes_effect_s);
/* The next pseudo-random number in [0, 1). */
double state_draw(struct dynamics *d);
/* A copy of the changing state as last written; takes no lock. */
void state_snapshot(const struct state *s, struct dynamics *d);
/* Make d the current state; the caller holds the file's lock. */
void state_commit(struct state *s, const struct dynamics *d);
/* Append to the ring log; the caller holds the file's lock and commits d. */
void state_log(struct state *s, struct dynamics *d, uint32_t mhz, int refused);

#endif
