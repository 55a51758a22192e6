// The moments of rows on a CPU, and what a norm takes from them.
#include "row_moments.h"

#include <algorithm>

#include "brain_float.h"
#include "rows.h"
#include "scope.h"
#include "shares.h"

namespace fastvit {
namespace {

using Size = std::int64_t;

constexpr Size kRowsAShare = 16;

template <typename Function>
void for_rows(Size rows, const Function& function) {
  share_out((rows + kRowsAShare - 1) / kRowsAShare, [&](Size share, Size) {
    for (Size row = share * kRowsAShare; row < std::min((share + 1) * kRowsAShare, rows); ++row) function(row);
  });
}

template <typename T, typename Wide>
void take_moments(const Tensor& x, Tensor& moments) {
  const Size rows = x.size(0), columns = x.size(1);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  Wide* to = static_cast<Wide*>(moments.mutable_data_ptr());
  for_rows(rows, [&](Size row) {
    for (Size part = 0; part < moment_parts(columns); ++part) {
      const Size first = part * kMomentColumns, count = std::min<Size>(kMomentColumns, columns - first);
      const T* numbers = from + row * columns + first;
      const Moments<Wide> of = moments_of<Wide>(count, [&](Size i) { return Wide(widen(numbers[i])); });
      Wide* pair = to + (part * rows + row) * 2;
      pair[0] = of.mean;
      pair[1] = of.squares;
    }
  });
}

template <typename Wide>
void take_statistics(const Tensor& moments, Size rows, Size columns, const Norm& norm, Statistics& to) {
  const Wide* from = static_cast<const Wide*>(moments.const_data_ptr());
  Wide* mean = norm.rms ? nullptr : static_cast<Wide*>(to.mean.mutable_data_ptr());
  Wide* rstd = static_cast<Wide*>(to.rstd.mutable_data_ptr());
  for_rows(rows, [&](Size row) {
    const auto load = [&](Size part, Wide& of_mean, Wide& squares) {
      const Wide* pair = from + (part * rows + row) * 2;
      of_mean = pair[0];
      squares = pair[1];
    };
    const RowStatistics<Wide> of = statistics_from(joined_moments<Wide>(columns, load), Wide(norm.eps), norm.rms);
    if (mean) mean[row] = of.mean();
    rstd[row] = of.rstd;
  });
}

}  // namespace

Tensor row_moments(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  Tensor moments = empty_beside(x, {moment_parts(x.size(1)), x.size(0), 2}, statistics_dtype(dtype));
  if (dtype == ScalarType::Double) {
    take_moments<double, double>(x, moments);
  } else if (dtype == ScalarType::Float) {
    take_moments<float, float>(x, moments);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, current_op, ": the CPU library has no rows of ", name_of(dtype));
    take_moments<BrainFloat, float>(x, moments);
  }
  return moments;
}

Statistics statistics_of_moments(const Tensor& moments_, const Tensor& x, const Norm& norm) {
  const Size rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = statistics_dtype(x.scalar_type());
  const Tensor moments = checked_moments(moments_, x, moment_parts(columns));
  Statistics to{empty_beside(x, {norm.rms ? 0 : rows}, dtype), empty_beside(x, {rows}, dtype)};
  dtype == ScalarType::Double ? take_statistics<double>(moments, rows, columns, norm, to)
                              : take_statistics<float>(moments, rows, columns, norm, to);
  return to;
}

}  // namespace fastvit
