"""Faults put into the C++ of the compiled ops one at a time, and the check that each fails."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old``, which the file of csrc/ holds exactly once, becomes ``new``; the check is to fail."""

    file: str
    fault: str
    old: str
    new: str
    check: str


_STATISTICS = "row_statistics(first, off, squares, RowWidth<Wide>(cols), Wide(norm.eps), norm.rms);"
_LOW_STATISTICS = f"""[&] {{
  RowStatistics<Wide> low = {_STATISTICS}
  for (Wide* x : {{&low.first, &low.rest, &low.rstd}}) {{
    BrainFloat half;
    store(half, float(*x));
    *x = widen(half);
  }}
  return low;
}}();"""
_ROWS_OF_VALUES = (
    "for (Size row = 0; row < rows; ++row) {\n      const Out* value = static_cast<const Out*>(value_)"
)
_OWN_STATISTICS = "at(rstd, row, 1), how.arrays, at(beside"
_ADDED = "from(residual), from(dense(weight)), from(dense(bias))"
_BIAS_ROWS = "product(torch::stable::new_zeros(x, {x.size(0), x.size(1)}, x.scalar_type()), weight, bias)"
_HALVES = "torch::stable::narrow(both, 1, {}, half), torch::stable::narrow(both, 1, {}, half)"
_VALUE_AND_GATE = "Function::value(widen(gate[i])) * widen(value[i])"
_LAST_ROWS = (
    "for (; row < rows; ++row) {\n      FASTVIT_SIMD\n      for (Size i = 0; i < cols; ++i) sum[i] += term"
)

_ROWS: dict[str, list[tuple[str, str, str, str]]] = {
    "row_norm.h": [
        ("eps dropped", "variance) + eps)", "variance))", "linear bf16, small std"),
        ("eps 1e-5 for 1e-6", "variance) + eps)", "variance) + 10 * eps)", "linear bf16, small std"),
        (
            "unbiased variance",
            "row.mean_of(squares) - rest",
            "RowWidth<T>(row.width - 1).mean_of(squares) - rest",
            "linear bf16, width 16",
        ),
        ("mean term dropped", "(grad - mean)", "grad", "dlinear"),
        ("second correction term dropped", " - normalized * product", "", "dlinear"),
        ("rstd of the gradient dropped", "return rstd * ((grad", "return ((grad", "dlinear"),
    ],
    "row_loops.cpp": [
        ("statistics in bf16", _STATISTICS, _LOW_STATISTICS, "linear bf16, offset"),
        (
            "rms_norm takes the mean off",
            "if (!norm.rms) first =",
            "first =",
            "linear, rms",
        ),
        ("bias of the norm dropped", "* weight[i] + bias[i])", "* weight[i])", "linear"),
        (
            "weight of the norm's gradient dropped",
            "return weight ? widen(grad[i])",
            "return false ? widen(grad[i])",
            "dlinear",
        ),
        ("a sum that forgets", "sum[i] += widen(grad[i]) *", "sum[i] = widen(grad[i]) *", "dlinear"),
        ("gradient of the residual dropped", "beside ? own + widen(beside[i]) : own", "own", "dmlp"),
        ("residual dropped", "widen(residual[i]) + branch", "branch", "residual, scaled"),
        ("LayerScale dropped", "scale ? scale[i] * widen(y[i]) :", "false ? Wide(0) :", "residual, scaled"),
        ("sample_scale dropped", ": widen(y[i])) * factor;", ": widen(y[i]));", "residual, scaled"),
        ("last row unwritten", _ROWS_OF_VALUES, _ROWS_OF_VALUES.replace("< rows", "< rows - 1"), "mlp"),
        (
            "gate and value swapped",
            _VALUE_AND_GATE,
            "widen(gate[i]) * Function::value(widen(value[i]))",
            "mlp, swiglu",
        ),
        ("slope of the gate dropped", "g * v * slope", "g * v", "dmlp, swiglu"),
        ("last row of a sum dropped", _LAST_ROWS, _LAST_ROWS.replace("< rows", "< rows - 1"), "dlinear"),
        ("third row of a sum dropped", "(term(row + 2, i) + term", "(term", "dlinear"),
        ("last row of a tile dropped", "j0 + tile : rows;", "j0 + tile : rows - 1;", "dlinear"),
        ("one factor of a product of rows", "widen(a[row * cols + i]) *", "", "dresidual"),
        (
            "LayerScale of gradients dropped",
            "scale ? scale[i] * widen(x[i]) :",
            "false ? Wide(0) :",
            "dresidual",
        ),
    ],
    "rows_cpu.cpp": [
        ("last chunk of a sum dropped", "if (row < rows) add(", "if (row + kChunk < rows) add(", "dlinear"),
        ("statistics of the first rows", _OWN_STATISTICS, _OWN_STATISTICS.replace("row", "0", 1), "dlinear"),
        ("sample_scale of another sample", "[sample]);\n      row", "[0]);\n      row", "residual, scaled"),
        ("halves of the gradient swapped", "if (packed) dv +=", "if (packed) dg +=", "dmlp, swiglu"),
    ],
    "products_cpu.cpp": [
        (
            "bias added twice",
            _ADDED,
            _ADDED.replace("residual", f"add_scaled(residual, {_BIAS_ROWS}, {{}}, {{}})"),
            "residual",
        ),
        ("bias dropped", _ADDED, _ADDED.replace("dense(bias)", "OptionalTensor()"), "residual"),
        ("tanh for erf", '"gelu", "none"', '"gelu", "tanh"', "mlp"),
        ("relu for silu", '"swish"', '"relu"', "mlp, silu"),
        ("LayerScale forgotten", "{bias, layer_scale, residual,", "{bias, {}, residual,", "LayerScale"),
        ("the second block of rows again", "share / parts * rows,", "rows,", "several weights"),
        ("a weight's rows too near", "in_panels ? 0 : matrix.stride(0)", "out.size(1)", "LayerScale"),
        ("a slice without gaps", "out.stride(0), in_panels", "out.size(1), in_panels", "several weights"),
    ],
    "panels.cpp": [
        ("bias of another panel", "p.bias[first + i]", "p.bias[i]", "several weights"),
        ("LayerScale of another panel", "p.scale[first + i]", "p.scale[i]", "LayerScale"),
        ("residual forgotten", "} else if (residual) {", "} else if (false) {", "LayerScale"),
    ],
    "attention_cpu.cpp": [
        ("mask of another image", "b * mask->stride(0)", "0 * mask->stride(0)", "attention, mask"),
        ("values of another head", "h * v.stride(1)", "(h ^ 1) % heads * v.stride(1)", "attention"),
        ("last block forgotten", "(part + 1) * blocks / parts", "part * blocks / parts", "attention"),
        (
            "scale dropped",
            "static_cast<float>(scale)",
            "0 * static_cast<float>(scale) + 1",
            "attention, scaled",
        ),
    ],
    "attention_heads.cpp": [
        (
            "keys behind the last seen",
            ": seen), row + padded, -INFINITY",
            ": padded), row + padded, -INFINITY",
            "attention",
        ),
        ("causal by one more", "std::min(seen, query + 1)", "std::min(seen, query + 2)", "attention, causal"),
        ("mask forgotten", "row[key] += mask", "row[key] += 0 * mask", "attention, mask"),
        ("mask of the first query", "query * head.mask_row", "0 * head.mask_row", "attention, mask"),
        ("largest not taken off", "logits[j + i] - largest", "logits[j + i]", "attention, scaled"),
        ("the sum of eight", "half = kPanel / 2; half > 0", "half = kPanel / 4; half > 0", "attention"),
        ("another row's sum", "left * inverse[i + j]", "left * inverse[i]", "attention"),
        (
            "a panel's last key",
            "Size i = 0; i < width; ++i) panel[i] =",
            "Size i = 0; i < width - 1; ++i) panel[i] =",
            "attention",
        ),
        ("the first channels again", "values + channel * head.keys", "values + 0 * channel", "attention"),
    ],
    "strip.h": [
        ("two rows are one", "rows[i] = x + i * stride", "rows[i] = x + i / 2 * 2 * stride", "attention"),
        (
            "the last step left out",
            "step < depth; ++step) {\n    __builtin",
            "step < depth - 1; ++step) {\n    __builtin",
            "attention",
        ),
    ],
    "branch.h": [
        ("LayerScale of gradients dropped", "scale(scaled, layer_scale,", "scale(scaled, {},", "dresidual"),
        (
            "sample_scale of gradients dropped",
            "scale(grad, {}, sample_scale",
            "scale(grad, {}, {}",
            "dresidual",
        ),
        ("LayerScale dropped", "product, layer_scale, sample", "product, {}, sample", "residual, scaled"),
    ],
    "layer_norm_linear.cpp": [
        ("rows not normalised again", "needs_weight ? renorm_rows", "false ? renorm_rows", "dlinear"),
        ("one weight's place for all", "at += own;", "", "several weights"),
        ("one bias for all", "weights[i], bias(i)", "weights[i], bias(0)", "several weights"),
    ],
    "linear_residual.cpp": [
        ("product of another", "saved[0]) : std::nullopt", "x) : std::nullopt", "dresidual"),
    ],
    "layer_norm_mlp.cpp": [
        ("gate and value swapped", _HALVES.format("half", 0), _HALVES.format(0, "half"), "mlp, swiglu"),
        ("inner norm dropped", "a = inner.rows;", "", "mlp, inner norm"),
        ("gradient of the gate dropped", "if (gate_weight) dh =", "if (false) dh =", "dmlp, own gate"),
        (
            "gradient of the residual dropped",
            "needs_x ? OptionalTensor(as_rows(grad))",
            "false ? OptionalTensor(grad)",
            "dmlp",
        ),
    ],
    "activations.h": [
        ("a digit of the tail", "0.19748377850979876f", "0.1975f", "mlp"),
        ("density of gelu's slope dropped", "slope = phi + x * density", "slope = phi", "dmlp"),
        (
            "density of gelu_half's slope dropped",
            "slope = phi + (y - y * phi) * u_slope",
            "slope = phi",
            "dmlp bf16",
        ),
        ("slope of silu's sigmoid dropped", "slope = s + y * (T(1) - s) * k", "slope = s", "dmlp, silu"),
        ("1.7 for 1.702", "T(1.702)", "T(1.7)", "mlp, quick_gelu"),
        ("a three of gelu_tanh's slope dropped", "T(3) * c", "c", "dmlp, gelu_tanh"),
        ("a digit of gelu_tanh", "T(0.044715)", "T(0.0447)", "mlp, gelu_tanh"),
    ],
    "brain_float.h": [
        ("cut instead of rounded", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits", "linear bf16"),
    ],
}
MUTANTS = [Mutant(file, *row) for file, rows in _ROWS.items() for row in rows]

# Of what is on a GPU alone: the check is one of test_fc1.py's.
_FC1 = {
    "fragments.h": [
        ("a neighbour's number", "::value(x[i])", "::value(x[i & ~1])", "contract"),
        ("slope dropped", "= grad[i] * slope;", "= grad[i];", "contract"),
        (
            "a lane keeps what it sends",
            "kept = upper ? sums[i + half]",
            "kept = !upper ? sums[i + half]",
            "sums",
        ),
        ("a step of the lanes left out", "half > 0; half /= 2", "half > 1; half /= 2", "sums"),
        ("slope for the activation", "= grad[i] * slope;", "= grad[i] * (activated[i] = slope);", "contract"),
    ],
    "activations.h": [
        ("tanh for erf", "use(OneGelu())", "use(GeluTanh())", "gelu"),
        ("gelu for quick_gelu", "use(QuickGelu())", "use(OneGelu())", "quick_gelu"),
        ("a digit of the polynomial", "kFold * 0.0729398617)", "kFold * 0.073)", "gelu"),
        ("a three of its slope dropped", "3.0f * 0.0729398617f", "0.0729398617f", "contract"),
    ],
    "fc1_tiles.h": [
        ("waves not rounded up", "waves = parts(tiles, workers)", "waves = tiles / workers", "small"),
        ("partial sums for nothing", "+ kSplit", "+ 0 * kSplit", "small"),
        (
            "an epilogue for nothing",
            "waves * (cycles.products + cycles.epilogue)",
            "waves * cycles.products",
            "hide",
        ),
        (
            "operands for nothing",
            "kHalf / kSharedBytes * steps",
            "kHalf / kSharedBytes * 0 * steps",
            "wide",
        ),
        ("spilling tiles", "kForward || !is_wide(tile)", "kForward || tile.rows > 0", "spills"),
    ],
}
FC1_MUTANTS = [Mutant(file, *row) for file, rows in _FC1.items() for row in rows]

# Of a norm folded into the product after it: the check is one of test_folding.py's. What is not C++ is in
# fastvit.ops.native.folded.
_FOLDED = {
    "fragments.h": [
        ("mean left in", "fmaf(-mean[i]", "fmaf(0.0f * mean[i]", "offset"),
        ("another's sum", "sums[i], product", "sums[i & ~1], product", "offset"),
        ("not scaled", "product[i]), rstd[i]", "product[i]), 1.0f + 0.0f * rstd[i]", "plain"),
        ("bias dropped", "rstd[i], bias[i])", "rstd[i], 0.0f * bias[i])", "plain"),
    ],
    "row_norm.h": [
        ("eps dropped", "variance) + eps)", "variance) + 0 * eps)", "small std"),
        ("mean of the first pass alone", "return first + rest;", "return rest;", "offset"),
    ],
    "native.py": [
        ("sums of the weight before rounding", "ready.double().sum(1)", "(wide * norm_weight).sum(1)", "100"),
        ("the norm's bias dropped", "wide @ norm_bias.double()", "0 * sums", "plain"),
        ("bias from the folded weight", "wide @ norm_bias", "ready.double() @ norm_bias", "plain"),
        ("bias dropped", "copy[2] + joined(biases)", "copy[2]", "plain"),
        ("the norm's weight dropped", "wide * norm_weight.double()", "wide", "plain"),
        (
            "a source forgotten",
            "(*weights, norm_weight, norm_bias), prepared",
            "weights, prepared",
            "edits",
        ),
    ],
}
FOLDING_MUTANTS = [Mutant(file, *row) for file, rows in _FOLDED.items() for row in rows]
