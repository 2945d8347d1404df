#include "threads.h"

#include <stdlib.h>

#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace headscope {

namespace {

constexpr size_t ALIGNMENT = 64;
constexpr size_t HUGE_PAGE = size_t{2} << 20;

class Memory {
public:
    Memory() = default;
    ~Memory() { free(start_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* at_least(size_t bytes) {
        if (bytes <= size_ && start_) return aligned_;
        free(start_);
        // tiles jump between more pages than the first-level TLB has entries, unless the pages are large
        const size_t alignment = bytes > HUGE_PAGE / 4 ? HUGE_PAGE : ALIGNMENT;
        size_ = (bytes + alignment) / alignment * alignment;
        start_ = malloc(size_ + alignment);
        if (!start_) {
            size_ = 0;
            return nullptr;
        }
        const uintptr_t first = reinterpret_cast<uintptr_t>(start_) + alignment - 1;
        aligned_ = reinterpret_cast<void*>(first / alignment * alignment);
#if defined(__linux__)
        // advice only: without huge pages it works as well
        if (alignment == HUGE_PAGE) madvise(aligned_, size_, MADV_HUGEPAGE);
#endif
        return aligned_;
    }

private:
    void* start_ = nullptr;
    void* aligned_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

void* thread_memory(size_t bytes) {
    static thread_local Memory memory;
    return memory.at_least(bytes);
}

void wait_until_above(const std::atomic<int64_t>* progress, int64_t value) {
    for (int tries = 0; progress->load(std::memory_order_acquire) <= value; ++tries) {
        // the other thread is at work, unless it lost its processor to somebody
        if (tries > 1000) std::this_thread::yield();
    }
}

void publish(std::atomic<int64_t>* progress, int64_t value) { progress->store(value, std::memory_order_release); }

}  // namespace headscope
