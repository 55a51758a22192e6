// attention on a CPU, forward: heads and blocks of their queries, shared out over threads.
#include "attention_heads.h"
#include "ops.h"
#include "scope.h"
#include "shares.h"

namespace fastvit {

namespace {

void attend(const AttentionHead& head, std::int64_t first, std::int64_t last, float* scratch) {
#if defined(FASTVIT_LEVELS)
  static const auto best = __builtin_cpu_supports("x86-64-v3") ? v3::attend : base::attend;
  best(head, first, last, scratch);
#else
  base::attend(head, first, last, scratch);
#endif
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

Tensor channels_contiguous(const Tensor& x) { return x.stride(3) == 1 ? x : packed(x); }

}  // namespace

Tensor attention_fwd(Tensor q_, Tensor k_, Tensor v_, OptionalTensor mask, bool causal, double scale) {
  const Scope scope("attention", q_, v_);
  for (const Tensor* x : {&q_, &k_, &v_}) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, current_op, ": the CPU library has float32 alone");
  }
  const Tensor q = channels_contiguous(q_), k = channels_contiguous(k_), v = channels_contiguous(v_);
  const std::int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), channels = q.size(3);
  for (const Tensor* x : {&k, &v}) {
    STD_TORCH_CHECK(sizes_of(*x) == Sizes({batch, heads, keys, channels}), current_op, ": k and v differ from q in shape");
  }
  if (keys == 0) return torch::stable::new_zeros(q, {batch, queries, heads, channels});
  Tensor out = empty_beside(q, {batch, queries, heads, channels}, ScalarType::Float);
  if (out.numel() == 0) return out;

  const std::int64_t threads = torch::stable::get_num_threads(), blocks = (queries + kQueries - 1) / kQueries;
  // Each share lays out the keys and values of its head: no more of them than threads have use for.
  const std::int64_t wanted = (threads * kSharesAThread + batch * heads - 1) / (batch * heads);
  const std::int64_t parts = threads == 1 ? 1 : std::min(blocks, wanted);
  const std::int64_t shares = batch * heads * parts, size = attention_scratch(keys, channels);
  Tensor scratch = empty_beside(q, {std::min(threads, shares), size}, ScalarType::Float);
  share_out(shares, [&](std::int64_t share, std::int64_t thread) {
    const std::int64_t b = share / parts / heads, h = share / parts % heads, part = share % parts;
    const AttentionHead head{
        floats(q) + b * q.stride(0) + h * q.stride(1),
        floats(k) + b * k.stride(0) + h * k.stride(1),
        floats(v) + b * v.stride(0) + h * v.stride(1),
        mask ? floats(*mask) + b * mask->stride(0) + h * mask->stride(1) : nullptr,
        static_cast<float*>(out.mutable_data_ptr()) + (b * queries * heads + h) * channels,
        q.stride(2),
        k.stride(2),
        v.stride(2),
        heads * channels,
        mask ? mask->stride(2) : 0,
        mask ? mask->stride(3) : 0,
        queries,
        keys,
        channels,
        static_cast<float>(scale),
        causal,
    };
    attend(head, part * blocks / parts * kQueries, std::min(queries, (part + 1) * blocks / parts * kQueries),
           static_cast<float*>(scratch.mutable_data_ptr()) + thread * size);
  });
  return out;
}

}  // namespace fastvit
