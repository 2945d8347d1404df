// What this machine's cores can do at most, as JSON: multiply-adds, bfloat16 dot products, and copies of memory.
//
//     c++ -O3 -march=native -fopenmp -std=c++17 peaks.cpp -o peaks && ./peaks THREADS
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best of several runs of work(), which every thread does: runs per second and thread.
template <typename Work>
double rate(int threads, const Work& work) {
    double best = 1e30;
    for (int repeat = 0; repeat < 15; ++repeat) {
        const double start = now();
#pragma omp parallel num_threads(threads)
        work();
        const double taken = now() - start;
        best = taken < best ? taken : best;
    }
    return 1.0 / best;
}

constexpr int STEPS = 400000, CHAINS = 16;

#if defined(__AVX512F__)
using Vector = __m512;
Vector step(Vector sum, Vector x) { return _mm512_fmadd_ps(sum, x, x); }
Vector of(float x) { return _mm512_set1_ps(x); }
#else
using Vector = __m256;
Vector step(Vector sum, Vector x) { return _mm256_fmadd_ps(sum, x, x); }
Vector of(float x) { return _mm256_set1_ps(x); }
#endif

void multiply_adds() {
    Vector sums[CHAINS], x = of(0.5f);
    for (Vector& sum : sums) sum = of(1.0f);
    for (int i = 0; i < STEPS; ++i) {
#pragma GCC unroll 16
        for (Vector& sum : sums) {
            sum = step(sum, x);
            // else the compiler would see that all chains are one
            asm volatile("" : "+v"(sum));
        }
    }
}

#if defined(__AVX512BF16__)
void dot_products() {
    __m512 sums[CHAINS];
    __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    for (__m512& sum : sums) sum = _mm512_set1_ps(1.0f);
    for (int i = 0; i < STEPS; ++i) {
#pragma GCC unroll 16
        for (__m512& sum : sums) {
            sum = _mm512_dpbf16_ps(sum, x, x);
            asm volatile("" : "+v"(sum));
        }
    }
}
#endif

}  // namespace

int main(int count, char** arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 1;
    const double lanes = sizeof(Vector) / 4;
    const double operations = static_cast<double>(threads) * STEPS * CHAINS;
    printf("{\"threads\": %d, \"multiply_add_gflops\": %.1f", threads,
           rate(threads, multiply_adds) * operations * lanes * 2 / 1e9);
#if defined(__AVX512BF16__)
    printf(", \"bfloat16_dot_gflops\": %.1f", rate(threads, dot_products) * operations * lanes * 4 / 1e9);
#endif
    // far beyond the caches; each byte is read and written
    const size_t bytes = size_t{128} << 20;
    std::vector<char> from(bytes, 1), to(bytes, 2);
    const size_t part = bytes / static_cast<size_t>(threads);
    double best = 1e30;
    for (int repeat = 0; repeat < 7; ++repeat) {
        const double start = now();
#pragma omp parallel for num_threads(threads)
        for (int t = 0; t < threads; ++t) memcpy(to.data() + part * t, from.data() + part * t, part);
        const double taken = now() - start;
        best = taken < best ? taken : best;
    }
    printf(", \"copy_gbytes_per_second\": %.1f}\n", 2.0 * static_cast<double>(bytes) / best / 1e9);
    return 0;
}
