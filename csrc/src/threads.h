// Work items on several threads, each with working memory that it keeps from call to call.
#ifndef HEADSCOPE_THREADS_H
#define HEADSCOPE_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include <atomic>

#if defined(HEADSCOPE_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace headscope {

// This thread's working memory, at least `bytes`, aligned to 64, contents arbitrary; nullptr if there is none. It lives
// until the thread ends or asks for more: a fresh mapping's page faults would show in every small call.
void* thread_memory(size_t bytes);

// Returns when another thread has published more than `value`; what it wrote before is then there to be read.
void wait_until_above(const std::atomic<int64_t>* progress, int64_t value);
void publish(std::atomic<int64_t>* progress, int64_t value);

#if defined(HEADSCOPE_STD_THREADS)
// For the thread sanitizer, which sees the synchronisation of these threads, but not that of an OpenMP runtime.
constexpr const char* THREADING = "std::thread";
#elif defined(_OPENMP)
constexpr const char* THREADING = "OpenMP";
#else
constexpr const char* THREADING = "none";
#endif

// function(i, memory) for each i of first..end - 1, on several threads, begun in this order: a call may wait for those
// before it. False, and no call was made, where a thread got no memory.
template <typename Function>
bool spread(int64_t first, int64_t end, int64_t threads, size_t bytes, const Function& function) {
    if (threads > end - first) threads = end - first;
#if defined(HEADSCOPE_STD_THREADS)
    if (threads > 1) {
        std::atomic<int64_t> next{first};
        std::atomic<bool> failed{false};
        std::vector<std::thread> team;
        for (int64_t t = 0; t < threads; ++t) {
            team.emplace_back([&] {
                void* memory = thread_memory(bytes);
                if (!memory) failed = true;
                for (int64_t i = next++; memory && i < end; i = next++) function(i, memory);
            });
        }
        for (std::thread& thread : team) thread.join();
        return !failed;
    }
#elif defined(_OPENMP)
    if (threads > 1) {
        std::atomic<int64_t> next{first};
        std::atomic<bool> failed{false};
        // one after another: causal masks and removed heads make items uneven; several at a time where they are many
        // and small. Not by OpenMP's own schedule, which may begin with later ones.
        const int64_t chunk = 1 + (end - first) / (16 * threads);
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            void* memory = thread_memory(bytes);
            if (!memory) failed.store(true);
#pragma omp barrier
            for (int64_t begin = end; !failed.load() && (begin = next.fetch_add(chunk)) < end;) {
                const int64_t stop = begin + chunk < end ? begin + chunk : end;
                for (int64_t i = begin; i < stop; ++i) function(i, memory);
            }
        }
        return !failed.load();
    }
#endif
    void* memory = thread_memory(bytes);
    for (int64_t i = first; memory && i < end; ++i) function(i, memory);
    return memory != nullptr;
}

}  // namespace headscope

#endif
