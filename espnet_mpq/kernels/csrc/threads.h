// Work of one call on several threads: the caller and workers that sleep between calls.
//
// Not for the translation units of one instruction set: what stands inline here must be portable code.
#pragma once

namespace mpq {

// Threads worth waking for this many multiply-adds: 1 .. n_threads.
int threads_for(int n_threads, double n_products);

// Ends workers beyond n_threads - 1; every call begins with it, so that a lowered setting is followed.
void follow(int n_threads);

int n_workers();

using Part = void (*)(const void* job, int i, int slot);
void run_parts(int n_threads, int n, Part part, const void* job);

// job(i, slot) once for each i of 0 .. n - 1, on at most n_threads threads at a time; slot 0 .. n_threads - 1
// names the thread. Which thread does which part is not determined. When another thread of the program
// is inside, the caller does it all alone.
template <class Job>
void parallel(int n_threads, int n, const Job& job) {
    run_parts(n_threads, n, [](const void* j, int i, int slot) { (*static_cast<const Job*>(j))(i, slot); },
              &job);
}

}  // namespace mpq
