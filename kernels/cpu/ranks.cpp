// Processes that add up tensors through memory that they share: the same bits in each, every time.
//
//   memory   [ flag 0 | flag 1 | ... ]   a line of the cache each: the number of the sum that the rank has brought
//            [ slot 0 of rank 0 | slot 1 of rank 0 | slot 0 of rank 1 | ... ]
//
// For sum number s each rank copies its piece into its slot s % 2, raises its flag to s, waits until all flags are
// there, and adds all pieces up in the order of ranks. One wait for each sum is enough: a rank that fills slot s % 2
// again, for sum s + 2, has waited for all flags of sum s + 1, and whoever raised that one was done with reading sum s.
//
// What is written before a flag is raised (release) is seen by whoever has seen the flag (acquire), on ARM too.

#include <sched.h>
#include <time.h>

#include <atomic>

#include "vectors.h"

typedef std::atomic<int64_t> Flag;
static_assert(Flag::is_always_lock_free, "a lock would be one process's own");
constexpr long LINE = 128;  // bytes: two lines of 64, which some processors fetch together

static Flag& flag(char* memory, long rank) { return *(Flag*)(memory + LINE * rank); }
static char* piece(char* memory, long size, long slot, long rank, long number) {
    return memory + LINE * size + slot * (2 * rank + number % 2);
}

static long now() {  // microseconds
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Others may need this core to get there: so it is held for some microseconds only, then offered, then left.
static bool wait_for(Flag& other, long number, long end) {
    constexpr long SPINS = 400, OFFERS = 1000;  // about 20 and about 1000 microseconds
    for (long i = 0; i < SPINS; i++, relax())
        if (other.load(std::memory_order_acquire) >= number) return true;
    for (long begin = now(); other.load(std::memory_order_acquire) < number;) {
        long at = now();
        if (at >= end) return false;
        timespec moment = {0, 100000};
        if (at - begin < OFFERS) sched_yield(); else nanosleep(&moment, nullptr);
    }
    return true;
}

template <class T>
static void add_up(char* memory, long size, long slot, long number, T* to, long n) {
    const T* first = (const T*)piece(memory, size, slot, 0, number);
    long apart = 2 * slot / sizeof(T), i = 0;
    for (; i + W <= n; i += W) {
        V sum = load(first + i);
        for (long rank = 1; rank < size; rank++) sum += load(first + rank * apart + i);
        store(to + i, sum);
    }
    for (; i < n; i++) {
        float sum = get(first + i);
        for (long rank = 1; rank < size; rank++) sum += get(first + rank * apart + i);
        put(to + i, sum);
    }
}

extern "C" {

long ranks_memory(long size, long slot) { return (LINE + 2 * slot) * size; }  // bytes, zeros at the beginning

void ranks_bring(char* memory, long rank, long size, long slot, long number, const void* from, long bytes) {
    std::memcpy(piece(memory, size, slot, rank, number), from, bytes);
    flag(memory, rank).store(number, std::memory_order_release);
}

// Whether all have brought theirs, within so many microseconds.
int ranks_wait(char* memory, long size, long number, long microseconds) {
    long end = now() + microseconds;
    for (long rank = 0; rank < size; rank++)
        if (!wait_for(flag(memory, rank), number, end)) return 0;
    return 1;
}

void ranks_add(char* memory, long size, long slot, long number, void* to, long n, int is_bf16) {
    with_type(is_bf16, [&](auto t) { add_up(memory, size, slot, number, (decltype(t)*)to, n); });
}

void ranks_copy(char* memory, long size, long slot, long number, long from_rank, void* to, long bytes) {
    std::memcpy(to, piece(memory, size, slot, from_rank, number), bytes);
}
}
