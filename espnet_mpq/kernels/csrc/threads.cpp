// The worker threads: made on demand, spin briefly for the next part of a call, then sleep.
#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

// Between the layers of a step some microseconds pass; between two steps of a search, milliseconds.
constexpr auto kSpin = std::chrono::microseconds(40);
// A thread more for every so many multiply-adds; waking one costs about as much as half of them.
constexpr double kGrain = 2e6;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// One job at a time. `state` is its number * 256 + the workers it still takes; whoever lowers it by
// one is in and must count itself `done`. Closing a job sets the low byte to 0, so a worker that wakes
// too late never delays the caller.
class Pool {
public:
    // False when another thread of the program is inside.
    bool enter() { return !busy_.test_and_set(std::memory_order_acquire); }
    void leave() { busy_.clear(std::memory_order_release); }
    int n_workers() const { return n_workers_.load(std::memory_order_relaxed); }

    // Exactly n workers, or fewer when the system gives no more.
    void resize(int n) {
        if (n < n_workers()) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                wanted_.store(n);
            }
            wake_.notify_all();
            while (n_workers() > n) {
                threads_.back().join();
                threads_.pop_back();
                --n_workers_;
            }
        }
        wanted_.store(n);
        // Signals are the program's: Python's handlers expect its own threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            threads_.reserve(n);
            while (n_workers() < n) {
                const uint64_t number = state_.load() >> 8;
                threads_.emplace_back([this, i = n_workers(), number] { work(i, number); });
                ++n_workers_;
#ifdef __linux__
                pthread_setname_np(threads_.back().native_handle(), "mpq-worker");
#endif
            }
        } catch (...) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void run(int n, mpq::Part part, const void* job, int n_helpers) {
        part_ = part;
        job_ = job;
        n_ = n;
        n_helpers_ = n_helpers;
        next_.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t number = (state_.load() >> 8) + 1;
        state_.store(number << 8 | uint64_t(n_helpers));
        // Either this sees a sleeper, or the sleeper sees the new state before it sleeps.
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        do_parts(0);
        const int left = int(state_.exchange(number << 8) & 255);
        const int n_in = n_helpers - left;
        for (int spins = 0; done_.load(std::memory_order_acquire) != n_in; ++spins)
            spins < 1000 ? relax() : std::this_thread::yield();
    }

private:
    void do_parts(int slot) {
        for (int i = next_++; i < n_; i = next_++) part_(job_, i, slot);
    }

    void work(int index, uint64_t last) {
        for (;;) {
            uint64_t state = wait_for_job(index, last);
            if (index >= wanted_.load()) return;
            last = state >> 8;
            while (state & 255 && state >> 8 == last)
                if (state_.compare_exchange_weak(state, state - 1)) {
                    do_parts(n_helpers_ - int(state & 255) + 1);
                    done_.fetch_add(1, std::memory_order_release);
                    break;
                }
        }
    }

    // The state of a job after number `last`; of any when this worker is no longer wanted.
    uint64_t wait_for_job(int index, uint64_t last) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                const uint64_t state = state_.load();
                if (state >> 8 != last) return state;
                relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [&] { return state_.load() >> 8 != last || index >= wanted_.load(); });
        --sleepers_;
        return state_.load();
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::vector<std::thread> threads_;
    std::atomic<int> n_workers_{0}, wanted_{0}, sleepers_{0}, next_{0}, done_{0};
    std::atomic<uint64_t> state_{0};
    mpq::Part part_ = nullptr;
    const void* job_ = nullptr;
    int n_ = 0, n_helpers_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Never freed: at exit workers may still sleep in it. A forked child has no workers and forgets it.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
    Pool* found = the_pool.load();
    if (found) return found;
    Pool* made = new (std::nothrow) Pool;
    if (!made) return nullptr;
    if (!the_pool.compare_exchange_strong(found, made)) {
        delete made;
        return found;
    }
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
    return made;
}

}  // namespace

namespace mpq {

int threads_for(int n_threads, double n_products) {
    const double most = 1 + n_products / kGrain;
    return most < n_threads ? int(most) : n_threads;
}

void follow(int n_threads) {
    Pool* p = the_pool.load();
    if (!p || p->n_workers() < n_threads || !p->enter()) return;
    p->resize(n_threads - 1);
    p->leave();
}

int n_workers() {
    const Pool* p = the_pool.load();
    return p ? p->n_workers() : 0;
}

void run_parts(int n_threads, int n, Part part, const void* job) {
    int n_helpers = (n_threads < n ? n_threads : n) - 1;
    n_helpers = n_helpers < 255 ? n_helpers : 255;
    Pool* p = n_helpers > 0 ? pool() : nullptr;
    if (!p || !p->enter()) {
        for (int i = 0; i < n; ++i) part(job, i, 0);
        return;
    }
    if (p->n_workers() < n_helpers) p->resize(n_helpers);
    p->run(n, part, job, n_helpers);
    p->leave();
}

}  // namespace mpq
