// Aligned memory, the scratch memory of a thread, and the layout of activations.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "api.h"
#include "kernels.h"

MPQ_API void mpq_trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

namespace mpq {

int padded_cols(int64_t cols) { return int((cols + kPadCols - 1) / kPadCols * kPadCols); }

int64_t padded_rows(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }

int most_blocks(int64_t batch) {
    return batch < 2 ? kMostChunkBlocks
                     : int(std::max<int64_t>(kMostChunkBlocks / batch, kChunkBlocks));
}

int chunk_blocks(int n_blocks, int n_threads, int64_t batch) {
    const int blocks = most_blocks(batch);
    if (n_threads < 2) return std::min(n_blocks, blocks);
    // As many chunks for each thread, of nearly one size; at least two, as one may come late.
    const int most = n_threads * blocks, turns = (n_blocks + most - 1) / most;
    const int n_chunks = n_threads * (turns < 2 ? 2 : turns);
    return (n_blocks + n_chunks - 1) / n_chunks;
}

constexpr size_t kHugePage = size_t(2) << 20;    // of x86-64, and the common one of ARM

void* aligned_new(size_t n_bytes) {
    const bool is_huge = n_bytes >= kHugePage;
    void* p = nullptr;
    if (posix_memalign(&p, is_huge ? kHugePage : kAlignment, n_bytes ? n_bytes : 1)) return nullptr;
#ifdef MADV_HUGEPAGE
    // Reading in a row from main memory, twice as fast as over pages of 4 KiB. A failure is no matter.
    if (is_huge) madvise(p, n_bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return p;
}

void aligned_delete(void* p) { std::free(p); }

namespace {

constexpr size_t kSlab = size_t(32) << 20;           // 16 huge pages: what is left of the last slab is wasted
constexpr size_t kLeastInSlab = size_t(64) << 10;    // smaller pieces gain nothing

// Matrix of one thread side by side, freed together. A slab begins at a multiple of its size.
struct alignas(kAlignment) Slab {
    std::atomic<int> n_users;    // pieces in use, and the thread that still takes some
    size_t used;

    static void release(Slab* slab) {
        if (slab && slab->n_users.fetch_sub(1) == 1) aligned_delete(slab);
    }
};

struct OpenSlab {
    Slab* slab = nullptr;
    ~OpenSlab() { Slab::release(slab); }
};

// Larger pieces have huge pages of their own; in slabs the sanitizer sees no ends.
bool lies_in_slab(size_t n_bytes) {
#ifdef __SANITIZE_ADDRESS__
    return false;
#else
    return n_bytes >= kLeastInSlab && n_bytes < kHugePage;
#endif
}

}  // namespace

void* weights_new(size_t n_bytes) {
    if (!lies_in_slab(n_bytes)) return aligned_new(n_bytes);
    static thread_local OpenSlab open;
    n_bytes = Arena::padded(n_bytes);
    if (!open.slab || open.slab->used + n_bytes > kSlab) {
        void* p = nullptr;
        if (posix_memalign(&p, kSlab, kSlab)) return nullptr;
#ifdef MADV_HUGEPAGE
        madvise(p, kSlab, MADV_HUGEPAGE);
#endif
        Slab::release(open.slab);
        open.slab = new (p) Slab{{1}, sizeof(Slab)};
    }
    void* p = reinterpret_cast<char*>(open.slab) + open.slab->used;
    open.slab->used += n_bytes;
    ++open.slab->n_users;
    return p;
}

void weights_delete(void* p, size_t n_bytes) {
    if (!p || !lies_in_slab(n_bytes)) return aligned_delete(p);
    Slab::release(reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(p) / kSlab * kSlab));
}

Arena::~Arena() { aligned_delete(memory_); }

bool Arena::reserve(size_t n_bytes) {
    used_ = 0;
    if (n_bytes <= size_) return true;
    aligned_delete(memory_);
    memory_ = static_cast<char*>(aligned_new(n_bytes));
    size_ = memory_ ? n_bytes : 0;
    return memory_ != nullptr;
}

void* Arena::take(size_t n_bytes) {
    char* p = memory_ + used_;
    used_ += padded(n_bytes);
    return p;
}

Arena& thread_arena() {
    static thread_local Arena arena;
    return arena;
}

void interleave(const int8_t* q, int64_t stride, int64_t cols, int batch, int8_t* x, int32_t* sums) {
    const int64_t whole = cols / kQuadCols, n_quads = padded_cols(cols) / kQuadCols;
    for (int b = 0; b < batch; ++b) {
        const int8_t* row = q + b * stride;
        int32_t sum = 0;
        for (int64_t k = 0; k < cols; ++k) sum += row[k];
        sums[b] = sum;
        int8_t* to = x + kQuadCols * b;
        const int64_t step = int64_t(batch) * kQuadCols;
        for (int64_t k = 0; k < whole; ++k) std::memcpy(to + k * step, row + kQuadCols * k, kQuadCols);
        for (int64_t k = whole; k < n_quads; ++k) {
            int8_t last[kQuadCols] = {};
            for (int j = 0; j < kQuadCols; ++j)
                if (kQuadCols * k + j < cols) last[j] = row[kQuadCols * k + j];
            std::memcpy(to + k * step, last, kQuadCols);
        }
    }
}

}  // namespace mpq
