// Runs the kernel without Python, against the formula in double: for the sanitizers, and for machines without torch.
#include <stdio.h>

#include "problem.h"

int main() {
    const Problem problems[] = {
        // batch, heads, kv, queries, keys, dim, dim_v, causal, bool, additive, gate, fill, edits, threads
        {1, 1, 1, 1, 1, 1, 1, false, false, false, false, false, false, 1},
        {2, 4, 2, 37, 77, 40, 40, false, false, false, false, false, true, 3},
        {1, 2, 1, 65, 529, 17, 33, true, false, false, true, true, false, 2},
        {2, 3, 3, 70, 63, 12, 20, false, true, false, true, false, true, 2},
        {1, 3, 1, 63, 600, 8, 5, false, false, true, true, true, false, 1},
        {1, 2, 2, 9, 1030, 80, 160, false, false, false, false, false, true, 1},
        {1, 1, 1, 600, 20, 4, 4, true, false, false, false, false, false, 4},
        // whole tiles of rows and channels: read and written in place
        {1, 4, 2, 72, 150, 16, 40, false, false, false, false, false, false, 2},
        {2, 1, 1, 144, 700, 8, 16, true, false, false, false, false, false, 2},
        {1, 1, 1, 3, 2, 8, 8, false, false, false, false, false, false, 1, 20.0},
        {1, 2, 1, 9, 21, 16, 8, true, false, false, false, false, true, 1, 20.0},
        {1, 2, 2, 5, 0, 8, 8, false, false, false, true, true, true, 1},
        {1, 2, 2, 0, 5, 8, 8, false, false, false, false, false, false, 2},
        {0, 2, 2, 5, 5, 8, 8, true, false, false, false, false, true, 1},
        {1, 2, 2, 5, 5, 0, 8, false, false, false, false, false, false, 1},
        {1, 2, 2, 5, 5, 8, 0, false, false, false, true, true, true, 1},
        // everything at once
        {2, 4, 2, 19, 35, 24, 20, true, false, true, true, true, true, 3},
        {3, 2, 1, 21, 18, 3, 65, false, true, false, true, true, true, 2},
        {1, 3, 3, 130, 1100, 5, 2, true, false, false, true, false, true, 3},
    };
    check_refusals();
    int sets = 0;
    for (int instruction_set = HEADSCOPE_BASELINE; instruction_set <= HEADSCOPE_AVX512_BF16; ++instruction_set) {
        const char* name = headscope_instruction_set_name(instruction_set);
        if (!name) continue;
        ++sets;
        for (const Problem& problem : problems) {
            for (const int64_t dtype : {HEADSCOPE_FLOAT32, HEADSCOPE_BFLOAT16}) {
                check_forward(problem, dtype, instruction_set);
                check_backward(problem, dtype, instruction_set);
            }
        }
        printf("%s: %s\n", name, failures ? "failed" : "passed");
    }
    return failures || !sets ? 1 : 0;
}
