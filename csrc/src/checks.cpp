#include "checks.h"

namespace headscope {

namespace {

bool is_input_dtype(int64_t dtype) {
    return dtype == HEADSCOPE_FLOAT32 || dtype == HEADSCOPE_BFLOAT16 || dtype == HEADSCOPE_FLOAT16;
}

bool is_floating(int64_t dtype) { return is_input_dtype(dtype) || dtype == HEADSCOPE_FLOAT64; }

}  // namespace

int check_inputs(const headscope_attention& call) {
    const int64_t sizes[] = {call.batch, call.heads, call.kv_heads, call.queries, call.keys, call.dim, call.dim_v};
    for (const int64_t size : sizes) {
        if (size < 0) return HEADSCOPE_BAD_SIZE;
    }
    if (call.heads > 0 && (call.kv_heads == 0 || call.heads % call.kv_heads != 0)) return HEADSCOPE_BAD_HEADS;
    if (call.dim > HEADSCOPE_MAX_DIM || call.dim_v > HEADSCOPE_MAX_DIM) return HEADSCOPE_DIM_TOO_LARGE;
    const int64_t dtype = call.query.dtype;
    if (!is_input_dtype(dtype) || call.key.dtype != dtype || call.value.dtype != dtype) return HEADSCOPE_BAD_DTYPE;
    if (call.attention.data && call.attention.dtype != dtype) return HEADSCOPE_BAD_DTYPE;
    if (call.mask.data && call.mask.dtype != HEADSCOPE_BOOL && !is_floating(call.mask.dtype)) {
        return HEADSCOPE_BAD_DTYPE;
    }
    if (call.fill.data && !is_floating(call.fill.dtype)) return HEADSCOPE_BAD_DTYPE;
    if (!call.row_max != !call.log2_sum || (call.attention.data && !call.row_max)) return HEADSCOPE_NULL_POINTER;
    // an empty tensor may well have no storage
    const bool has_rows = call.batch && call.heads && call.queries;
    const bool has_keys = has_rows && call.keys;
    if ((has_rows && call.dim && !call.query.data) || (has_keys && call.dim && !call.key.data) ||
        (has_keys && call.dim_v && !call.value.data)) {
        return HEADSCOPE_NULL_POINTER;
    }
    return HEADSCOPE_OK;
}

}  // namespace headscope
