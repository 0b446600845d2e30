#include "state.h"

#include <assert.h>
#include <string.h>
#include <unistd.h>

static_assert(sizeof(struct header) == 320, "header as in state.py");
static_assert(sizeof(struct dynamics) == 328, "DYNAMICS as in state.py");
static_assert(sizeof(struct state) == 121920, "FILE_BYTES as in state.py");

static double least(double a, double b) { return a < b ? a : b; }
static double most(double a, double b) { return a > b ? a : b; }

unsigned state_index_at_most(const struct state *s, uint32_t mhz) {
    for (unsigned i = 0; i < s->header.clocks; i++)
        if (s->clocks_mhz[i] <= mhz) return i;
    return s->header.clocks - 1;
}

static unsigned asked_index(const struct state *s, const struct dynamics *d) {
    uint32_t mhz = d->clock_mhz;
    if (d->cap_mhz && d->cap_mhz < mhz) mhz = d->cap_mhz;
    return state_index_at_most(s, mhz);
}

static double power_at_w(const struct state *s, const struct dynamics *d, unsigned index) {
    return d->static_w + d->dynamic_w * s->relative_power[d->load][index];
}

/* The clock under the power limit: the highest one, at most the one asked for, at which the load keeps it. */
static unsigned held_index(const struct state *s, const struct dynamics *d, unsigned asked) {
    for (unsigned i = asked; i < s->header.clocks; i++)
        if (power_at_w(s, d, i) <= d->limit_w) return i;
    return s->header.clocks - 1;
}

unsigned state_effective_index(const struct state *s, const struct dynamics *d) {
    const unsigned asked = asked_index(s, d);
    return d->spare_j > 0.0 ? asked : held_index(s, d, asked);
}

double state_power_w(const struct state *s, const struct dynamics *d) {
    return power_at_w(s, d, state_effective_index(s, d));
}

double state_shown_j(const struct state *s, const struct dynamics *d) {
    const struct header *h = &s->header;
    const int fresh = d->at_s < h->tick_origin_s + (double)d->ticks * h->tick_period_s + h->tick_lag_s;
    return fresh ? d->counter_j - d->tick_j : d->counter_j;
}

double state_switch_s(const struct state *s, const struct dynamics *d, uint32_t mhz) {
    const uint32_t before_mhz = d->pending_count ? d->pending[d->pending_count - 1].mhz : d->clock_mhz;
    const unsigned index = state_index_at_most(s, mhz);
    return mhz > before_mhz ? s->rise_s[index] : s->drop_s[index];
}

static void integrate(const struct state *s, struct dynamics *d, double end_s, double power_w) {
    const double period = s->header.tick_period_s, window = s->header.tick_window_s, origin = s->header.tick_origin_s;
    d->energy_j += power_w * (end_s - d->at_s);
    double at_s = d->at_s, boundary = origin + (double)(d->ticks + 1) * period;
    if (end_s >= boundary) {
        d->window_j += power_w * most(0.0, boundary - most(at_s, boundary - window));
        d->tick_j = d->window_j * (period / window);
        d->counter_j += d->tick_j;
        d->window_j = 0.0;
        d->ticks += 1;
        at_s = boundary;
        const int64_t whole = (int64_t)((end_s - at_s) / period);
        if (whole > 0) d->tick_j = power_w * period;
        d->counter_j += (double)whole * power_w * period;
        d->ticks += whole;
        at_s += (double)whole * period;
        boundary = origin + (double)(d->ticks + 1) * period;
    }
    d->window_j += power_w * most(0.0, end_s - most(at_s, boundary - window));
}

static void end_work(const struct state *s, struct dynamics *d) {
    d->finished_s = d->at_s;
    d->work_s = d->done_s = 0.0;
    d->load = 0;
    d->dynamic_w = s->header.dynamic_w[0];
}

void state_advance(const struct state *s, struct dynamics *d, double to_s) {
    for (;;) {
        while (d->pending_count && d->pending[0].at_s <= d->at_s) {
            d->clock_mhz = d->pending[0].mhz;
            memmove(&d->pending[0], &d->pending[1], --d->pending_count * sizeof d->pending[0]);
        }
        if (d->at_s >= to_s) return;
        double end_s = d->pending_count ? least(to_s, d->pending[0].at_s) : to_s;
        const unsigned asked = asked_index(s, d);
        const double beyond_w = power_at_w(s, d, asked) - d->limit_w;
        const unsigned index = d->spare_j > 0.0 ? asked : held_index(s, d, asked);
        int finishes = 0, exhausts = 0;
        if (beyond_w > 0.0 && d->spare_j > 0.0) {
            const double exhausted_s = d->at_s + d->spare_j / beyond_w;
            exhausts = exhausted_s <= end_s;
            if (exhausts) end_s = most(d->at_s, exhausted_s);
        }
        if (d->work_s > 0.0) {
            const double pace = s->stretch[d->load][index] * d->slowdown[d->load];
            const double completes_s = d->at_s + (d->work_s - d->done_s) * pace;
            finishes = completes_s <= end_s;
            exhausts = exhausts && !(completes_s < end_s);
            if (finishes) end_s = most(d->at_s, completes_s);
            d->done_s += (end_s - d->at_s) / pace;
        }
        integrate(s, d, end_s, power_at_w(s, d, index));
        if (s->clocks_mhz[index] < d->clock_mhz) d->capped_s += end_s - d->at_s;
        const double burst_j = s->header.burst_j;
        if (exhausts)
            d->spare_j = 0.0;
        else if (burst_j > 0.0 && (beyond_w < 0.0 || d->spare_j > 0.0))
            d->spare_j = least(burst_j, most(0.0, d->spare_j - beyond_w * (end_s - d->at_s)));
        d->at_s = end_s;
        if (finishes) end_work(s, d);
    }
}

void state_change_clock(struct dynamics *d, uint32_t mhz, uint32_t locked_mhz, double takes_effect_s) {
    if (d->pending_count >= MAX_PENDING) d->pending_count--;
    if (d->pending_count) takes_effect_s = most(takes_effect_s, d->pending[d->pending_count - 1].at_s);
    d->pending[d->pending_count++] = (struct pending){takes_effect_s, mhz, 0};
    d->locked_mhz = locked_mhz;
}

double state_draw(struct dynamics *d) {
    uint64_t x = d->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    d->random = x;
    return (double)(x >> 11) / (double)(1ULL << 53);
}

void state_snapshot(const struct state *s, struct dynamics *d) {
    for (;;) {
        const uint64_t generation = __atomic_load_n(&s->generation, __ATOMIC_ACQUIRE);
        memcpy(d, &s->slots[generation & 1].dynamics, sizeof *d);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&s->generation, __ATOMIC_RELAXED) == generation) return;
    }
}

void state_commit(struct state *s, const struct dynamics *d) {
    const uint64_t generation = s->generation + 1;
    memcpy(&s->slots[generation & 1].dynamics, d, sizeof *d);
    __atomic_store_n(&s->generation, generation, __ATOMIC_RELEASE);
}

void state_log(struct state *s, struct dynamics *d, uint32_t mhz, int refused) {
    s->log[d->log_count++ % LOG_CAPACITY] =
        (struct log_entry){d->at_s, mhz, (uint32_t)getpid(), (uint32_t)refused, 0};
}
