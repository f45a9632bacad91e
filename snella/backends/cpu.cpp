// The elementwise part of a layer on the CPU, slice by slice; see cpu.py, which compiles and calls
// it, and tiles.py for the formulas and their names.
//
// REAL, PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED and FORM are set by the compiler's command
// line. Matrices are row-major, (outputs, inputs). Work goes row by row over short stretches of
// columns, whose values stay in the innermost cache; every loop over `i` is plain enough to be
// vectorised. Sums over outputs are formed in a fixed number of parts, so that results do not depend
// on the number of threads, and products are contracted only where std::fma says so, so that
// backward evaluates the merged matrix to the bits that forward selected from.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Real = REAL;
using Index = std::int64_t;
constexpr Index P = PIECES, H = COORDINATES, PARTS = 16, TILE = 256;
constexpr bool mixed = MIXED, tempered = TEMPERATURE, learned = LEARNED;
enum Form { none, released, paper };
constexpr Form form = static_cast<Form>(FORM);
constexpr Index K = (mixed ? 2 + tempered : 0) + (learned ? P : 0);

// One slice.
struct Slice {
    Index outputs, inputs, threads;
    const Real *a, *b, *scalars;  // (P, inputs, H), (P, outputs, H), (K)
    Real *softmax;                // (2, inputs): shift of the logits, and 1 / sum of exp
    double scale;
    Index size() const { return outputs * inputs; }
};

// The surviving entries; see snella.equations.sparsify.Selection. A cut of -1: there are none.
struct Selection {
    double threshold, subtracted;
    Index cut;
};

}  // namespace

extern "C" {

// A layer: its tensors hold one slice after the other. Mirrored in cpu.py.
struct Layer {
    Index slices, outputs, inputs, threads;
    const Real *a, *b, *scalars;
    Real *softmax;
    double scale;
};

}  // extern "C"

namespace {

Slice slice_of(const Layer &l, Index s) {
    return {l.outputs, l.inputs, l.threads, l.a + s * P * l.inputs * H,
            l.b + s * P * l.outputs * H, l.scalars + s * K, l.softmax + s * 2 * l.inputs, l.scale};
}

// The share of slice s, of `size` values, of a tensor that may be missing.
template <class Number>
Number *share(Number *tensor, Index s, Index size) {
    return tensor ? tensor + s * size : nullptr;
}

// Selections travel as (3, slices): thresholds, subtracted magnitudes and cuts.
void store(const Layer &l, Index s, const Selection &kept, double *selection) {
    selection[s] = kept.threshold;
    selection[l.slices + s] = kept.subtracted;
    selection[2 * l.slices + s] = double(kept.cut);
}

Selection load(const Layer &l, Index s, const double *selection) {
    return {selection[s], selection[l.slices + s], Index(selection[2 * l.slices + s])};
}

// What an empty slice leaves of the frozen weight.
void copy_base(const Real *base, Index size, Real *out) {
    if (!out) return;
    if (base) std::copy(base, base + size, out);
    else std::fill(out, out + size, Real(0));
}

// A slice's function, ready for evaluation.
struct Function {
    Index outputs, inputs;
    std::vector<Real> a;  // (P, H, inputs)
    const Real *b, *shift, *normaliser;
    Real floor[P], coefficient[P], scale = 0, offset = 0, rate = 1;
    bool overflows = false;  // whether exp of a logit could

    explicit Function(const Slice &s)
        : outputs(s.outputs), inputs(s.inputs), a(P * H * s.inputs), b(s.b), shift(s.softmax),
          normaliser(s.softmax + s.inputs) {
        for (Index p = 0; p < P; p++)
            for (Index i = 0; i < inputs; i++)
                for (Index h = 0; h < H; h++)
                    a[(p * H + h) * inputs + i] = s.a[(p * inputs + i) * H + h];
        if (mixed) scale = s.scalars[0], offset = s.scalars[1];
        if (mixed && tempered) rate = 1 / s.scalars[2];
        const Real *own = s.scalars + (mixed ? 2 + tempered : 0);
        Real reach = 0;
        for (Index p = 0; p < P; p++) {
            const Real largest = norm(s.a + p * inputs * H, inputs) + norm(b + p * outputs * H, outputs);
            using limits = std::numeric_limits<Real>;
            floor[p] = largest * limits::epsilon() + limits::min();
            coefficient[p] = learned ? own[p] : p % 2 ? Real(-0.1) : Real(0.1);
            reach += std::abs(coefficient[p]) * std::sqrt(2 * largest);
        }
        overflows = !(reach * std::abs(rate) < 60);
    }

    // The largest squared norm of the points (count, H).
    static Real norm(const Real *points, Index count) {
        Real largest = 0;
        for (Index n = 0; n < count; n++) {
            Real square = 0;
            for (Index h = 0; h < H; h++) square += points[n * H + h] * points[n * H + h];
            largest = std::max(largest, square);
        }
        return largest;
    }
};

// Values of a stretch of a row.
struct Tile {
    Real distance[P][TILE], linear[TILE], exponential[TILE], merged[TILE], amount[TILE], slope[TILE];
};

[[maybe_unused]] double exponential(double x) { return std::exp(x); }

// Within 2 units in the last place; vectorised, as the library's is not. 2^n exp(r), |r| < ln(2)/2.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const float n = (x * 1.44269504f + rounding) - rounding;
    const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float y = 1.9875691500e-4f;
    y = std::fma(y, r, 1.3981999507e-3f);
    y = std::fma(y, r, 8.3334519073e-3f);
    y = std::fma(y, r, 4.1665795894e-2f);
    y = std::fma(y, r, 1.6666665459e-1f);
    y = std::fma(y, r, 5.0000001201e-1f);
    y = std::fma(y, r * r, r) + 1;
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

void distances(const Real *__restrict a, Index stride, const Real *b, Real floor, Index width,
               Real *__restrict out) {
    Real point[H];
    std::copy(b, b + H, point);
#pragma omp simd
    for (Index i = 0; i < width; i++) {
        Real square = 0;
#pragma GCC unroll 64
        for (Index h = 0; h < H; h++) {
            const Real difference = point[h] - a[h * stride + i];
            square = std::fma(difference, difference, square);
        }
        out[i] = std::sqrt(square < floor ? floor : square);
    }
}

// D of a row from column `start` on, and the distances it is made of.
void linear(const Function &f, Index o, Index start, Index width, Real *__restrict out,
            Real (*distance)[TILE]) {
    for (Index p = 0; p < P; p++) {
        Real *__restrict d = distance[p];
        const Real *a = f.a.data() + p * H * f.inputs + start;
        distances(a, f.inputs, f.b + (p * f.outputs + o) * H, f.floor[p], width, d);
        const Real c = f.coefficient[p];
#pragma omp simd
        for (Index i = 0; i < width; i++) out[i] = p ? std::fma(d[i], c, out[i]) : d[i] * c;
    }
}

void exponentials(const Function &f, Index start, Index width, const Real *__restrict linear,
                  Real *__restrict out) {
    const Real *__restrict shift = f.shift + start;
    const Real rate = f.rate;
#pragma omp simd
    for (Index i = 0; i < width; i++) out[i] = exponential(linear[i] * rate - shift[i]);
}

// D + α softmax + β.
void add_softmax(const Function &f, Index start, Index width, const Real *__restrict linear,
                 const Real *__restrict exponential, Real *__restrict out) {
    const Real *__restrict normaliser = f.normaliser + start;
    const Real scale = f.scale, offset = f.offset;
#pragma omp simd
    for (Index i = 0; i < width; i++)
        out[i] = std::fma(exponential[i], normaliser[i] * scale, linear[i] + offset);
}

void evaluate(const Function &f, Index o, Index start, Index width, Tile &t) {
    linear(f, o, start, width, mixed ? t.linear : t.merged, t.distance);
    if (!mixed) return;
    exponentials(f, start, width, t.linear, t.exponential);
    add_softmax(f, start, width, t.linear, t.exponential, t.merged);
}

// S / merged and ∂S/∂merged where the magnitude exceeds `bound`, else 0.
void factors_above(Real bound, Real subtracted, Index width, const Real *__restrict merged,
                   Real *__restrict amount, Real *__restrict slope) {
#pragma omp simd
    for (Index i = 0; i < width; i++) {
        const Real magnitude = std::abs(merged[i]);
        const Real difference = form == paper ? magnitude - subtracted : magnitude;
        amount[i] = magnitude > bound ? difference : 0;
        slope[i] = magnitude > bound ? (form == paper ? magnitude + difference : magnitude) : 0;
    }
}

// As snella.equations.sparsify.factors. Up to the cut, entries that equal the threshold are kept too.
void factors(const Selection &kept, Index o, Index start, Index width, Index inputs, Tile &t) {
    if (form == none) {
        std::fill(t.amount, t.amount + width, Real(1));
        std::fill(t.slope, t.slope + width, Real(1));
        return;
    }
    const Real bound = kept.threshold, subtracted = kept.subtracted;
    const Real below = bound > 0 ? std::nextafter(bound, Real(0)) : Real(-1);
    const Index cut = std::clamp<Index>(kept.cut - o * inputs - start, 0, width);
    factors_above(below, subtracted, cut, t.merged, t.amount, t.slope);
    factors_above(bound, subtracted, width - cut, t.merged + cut, t.amount + cut, t.slope + cut);
}

void add_scaled(const Tile &t, Real scale, Index width, const Real *__restrict base,
                Real *__restrict out) {
#pragma omp simd
    for (Index i = 0; i < width; i++)
        out[i] = std::fma(t.merged[i], t.amount[i] * scale, base ? base[i] : 0);
}

// Call visit(part, row, first column, width) for all rows and stretches of columns.
template <class Visit>
void for_tiles(const Slice &s, Visit visit) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (Index part = 0; part < PARTS; part++)
        for (Index o = s.outputs * part / PARTS; o < s.outputs * (part + 1) / PARTS; o++)
            for (Index start = 0; start < s.inputs; start += TILE)
                visit(part, o, start, std::min(TILE, s.inputs - start));
}

// Sum or maximum over outputs, one value per column, collected in PARTS parts.
class Columns {
    Index count;
    std::vector<Real> parts;

  public:
    explicit Columns(Index count, Real initial = 0) : count(count), parts(PARTS * count, initial) {}

    Real *at(Index part, Index column) { return parts.data() + part * count + column; }

    template <class Combine>
    const Real *combine(const Slice &s, Combine two) {
        Real *__restrict total = parts.data();
#pragma omp parallel for num_threads(s.threads) schedule(static)
        for (Index first = 0; first < count; first += TILE)
            for (Index part = 1; part < PARTS; part++) {
                const Real *__restrict other = at(part, 0);
                const Index last = std::min(first + TILE, count);
#pragma omp simd
                for (Index i = first; i < last; i++) total[i] = two(total[i], other[i]);
            }
        return total;
    }

    const Real *sum(const Slice &s) {
        return combine(s, [](Real x, Real y) { return x + y; });
    }
};

// The largest logit of every column, as the shift.
void find_shift(const Slice &s, const Function &f) {
    Columns largest(s.inputs, -std::numeric_limits<Real>::infinity());
    for_tiles(s, [&](Index part, Index o, Index start, Index width) {
        Tile t;
        linear(f, o, start, width, t.linear, t.distance);
        Real *__restrict top = largest.at(part, start);
        for (Index i = 0; i < width; i++) top[i] = std::max(top[i], t.linear[i] * f.rate);
    });
    const Real *top = largest.combine(s, [](Real x, Real y) { return std::max(x, y); });
    std::copy(top, top + s.inputs, s.softmax);
}

// Write the merged matrix to `out`, and the softmax's shift and normaliser.
void merge(const Slice &s, Real *out) {
    const Function f(s);
    if (mixed) std::fill(s.softmax, s.softmax + s.inputs, Real(0));
    if (mixed && f.overflows) find_shift(s, f);
    Columns sums(mixed ? s.inputs : 0);
    for_tiles(s, [&](Index part, Index o, Index start, Index width) {
        Tile t;
        Real *__restrict row = out + o * s.inputs + start;
        linear(f, o, start, width, row, t.distance);
        if (!mixed) return;
        exponentials(f, start, width, row, t.exponential);
        Real *__restrict sum = sums.at(part, start);
#pragma omp simd
        for (Index i = 0; i < width; i++) sum[i] += t.exponential[i];
    });
    if (!mixed) return;
    const Real *sum = sums.sum(s);
    for (Index i = 0; i < s.inputs; i++) s.softmax[s.inputs + i] = 1 / sum[i];
    for_tiles(s, [&](Index, Index o, Index start, Index width) {
        Tile t;
        Real *row = out + o * s.inputs + start;
        std::copy(row, row + width, t.linear);
        exponentials(f, start, width, t.linear, t.exponential);
        add_softmax(f, start, width, t.linear, t.exponential, row);
    });
}

// The bits of a magnitude, which are ordered as the magnitudes are, and NaN above all.
using Key = std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>;

Key key_of(Real value) {
    Key key;
    std::memcpy(&key, &value, sizeof key);
    return key & (~Key(0) >> 1);
}

Real magnitude_of(Key key) {
    Real value;
    std::memcpy(&value, &key, sizeof value);
    return value;
}

// Entries with low <= key <= high of a part of a matrix, and the number of those below.
struct Range {
    std::vector<Key> keys;
    Index below = 0;

    void collect(const Real *__restrict merged, Index count, Key low, Key high) {
        constexpr Index WORD = 8;
        std::uint8_t inside[TILE + WORD] = {};
        for (Index start = 0; start < count; start += TILE) {
            const Real *__restrict part = merged + start;
            const Index width = std::min(TILE, count - start);
            Key less = 0;
#pragma omp simd reduction(+ : less)
            for (Index n = 0; n < width; n++) {
                const Key key = key_of(part[n]);
                less += key < low;
                inside[n] = key - low <= high - low;
            }
            below += less;
            std::fill(inside + width, inside + width + WORD, 0);
            for (Index n = 0; n < width; n += WORD) {
                std::uint64_t any;  // mostly none
                std::memcpy(&any, inside + n, WORD);
                for (Index k = n; any && k < n + WORD; k++)
                    if (inside[k]) keys.push_back(key_of(part[k]));
            }
        }
    }
};

// The bounds of the keys around the one of this rank in ascending order, by a histogram of their
// leading bits: certain, and quick for a small matrix.
void bounds_by_histogram(const Real *merged, Index total, Index rank, Key &low, Key &high) {
    constexpr int BITS = 12, SHIFT = 8 * sizeof(Key) - 1 - BITS;
    std::vector<std::uint32_t> counts(2 << BITS);  // two, for neighbours are often equal
    std::uint32_t *even = counts.data(), *odd = even + (1 << BITS);
    for (Index n = 0; n + 1 < total; n += 2)
        even[key_of(merged[n]) >> SHIFT]++, odd[key_of(merged[n + 1]) >> SHIFT]++;
    if (total % 2) even[key_of(merged[total - 1]) >> SHIFT]++;
    Key bin = 0;
    for (Index below = 0; (below += even[bin] + odd[bin]) <= rank;) bin++;
    low = bin << SHIFT, high = low | ((Key(1) << SHIFT) - 1);
}

// The same for a large matrix by a sample, which may mislead; its stride visits every column.
void bounds_by_sample(const Real *merged, Index total, Index rank, Key &low, Key &high) {
    std::vector<Key> sample;
    for (Index n = 0; n < total; n += 61) sample.push_back(key_of(merged[n]));
    const double share = double(rank) / total, count = sample.size();
    const double middle = share * count, spread = 4 * std::sqrt(middle * (1 - share)) + 1;
    const auto nth = [&](double n) {
        std::nth_element(sample.begin(), sample.begin() + Index(n), sample.end());
        return sample[Index(n)];
    };
    if (middle - spread > 0) low = nth(middle - spread);
    if (middle + spread < count) high = nth(middle + spread);
}

// Keys around the one of this rank, which becomes its rank among them.
std::vector<Key> candidates(const Slice &s, const Real *merged, Index &rank) {
    const Index total = s.size(), used = std::clamp<Index>(total >> 16, 1, PARTS);
    Key low = 0, high = ~Key(0) >> 1;
    (total > 1 << 16 ? bounds_by_sample : bounds_by_histogram)(merged, total, rank, low, high);
    for (;; low = 0, high = ~Key(0) >> 1) {  // all entries, should the sample mislead
        Range parts[PARTS], found;
#pragma omp parallel for num_threads(s.threads) schedule(static)
        for (Index part = 0; part < used; part++)
            parts[part].collect(merged + total * part / used,
                                total * (part + 1) / used - total * part / used, low, high);
        for (const Range &part : parts) {
            found.below += part.below;
            found.keys.insert(found.keys.end(), part.keys.begin(), part.keys.end());
        }
        if (rank >= found.below && rank < found.below + Index(found.keys.size())) {
            rank -= found.below;
            return found.keys;
        }
    }
}

// Where the first `surplus` entries of this key end, and the largest magnitude below it.
void break_tie(const Slice &s, const Real *merged, Key key, Index surplus, Selection &out) {
    const Index total = s.size();
    Index equals[PARTS] = {};
    Key lower[PARTS] = {};
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (Index part = 0; part < PARTS; part++) {
        Index equal = 0;
        Key largest = 0;
#pragma omp simd reduction(+ : equal) reduction(max : largest)
        for (Index n = total * part / PARTS; n < total * (part + 1) / PARTS; n++) {
            const Key other = key_of(merged[n]);
            equal += other == key;
            largest = std::max(largest, other < key ? other : Key(0));
        }
        equals[part] = equal, lower[part] = largest;
    }
    Index part = 0;
    while (surplus > equals[part]) surplus -= equals[part++];
    Index n = total * part / PARTS;
    for (; surplus; n++) surplus -= key_of(merged[n]) == key;
    out.cut = n;
    out.subtracted = magnitude_of(*std::max_element(lower, lower + PARTS));
}

// The `budget` largest magnitudes; exactly as snella.equations.sparsify.select.
Selection select(const Slice &s, const Real *merged, Index budget) {
    if (form == none || budget >= s.size()) return {-1, 0, 0};
    Index rank = s.size() - budget - 1;
    std::vector<Key> keys = candidates(s, merged, rank);
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end());
    const Key key = keys[rank];
    const Real threshold = magnitude_of(key);
    Selection kept = {threshold, threshold, 0};
    const Index surplus = std::count(keys.begin() + rank + 1, keys.end(), key);
    if (surplus && threshold == threshold) break_tie(s, merged, key, surplus, kept);
    return kept;
}

// Turn a merged matrix into base + scale * S, in place.
void finish(const Slice &s, const Selection &kept, Real *out, const Real *base) {
    for_tiles(s, [&](Index, Index o, Index start, Index width) {
        Tile t;
        const Index at = o * s.inputs + start;
        std::copy(out + at, out + at + width, t.merged);
        factors(kept, o, start, width, s.inputs, t);
        add_scaled(t, s.scale, width, base ? base + at : nullptr, out + at);
    });
}

// Σ_o ∂L/∂merged softmax, per column; writes base + scale * S again if there is memory for it.
std::vector<Real> softmax_mean(const Slice &s, const Function &f, const Selection &kept,
                               const Real *dense, const Real *base, Real *effective) {
    Columns means(mixed ? s.inputs : 0);
    for_tiles(s, [&](Index part, Index o, Index start, Index width) {
        Tile t;
        const Index at = o * s.inputs + start;
        evaluate(f, o, start, width, t);
        factors(kept, o, start, width, s.inputs, t);
        if (effective) add_scaled(t, s.scale, width, base ? base + at : nullptr, effective + at);
        if (!mixed) return;
        const Real *__restrict grad = dense + at;
        Real *__restrict sum = means.at(part, start);
        const Real scale = s.scale;
#pragma omp simd
        for (Index i = 0; i < width; i++)
            sum[i] += grad[i] * (t.slope[i] * scale) * t.exponential[i];
    });
    std::vector<Real> mean(s.inputs);
    const Real *sum = means.sum(s);
    if (mixed)
        for (Index i = 0; i < s.inputs; i++) mean[i] = sum[i] * f.normaliser[i];
    return mean;
}

// Gradients as they accumulate: of A per column (R b, then R), of B per row (R a, then R).
struct Sums {
    static constexpr Index width = P * (H + 1);
    Columns along_outputs;
    std::vector<Real> along_inputs;  // (outputs, P, H + 1)
    struct { double distance[P], offset, moment; } scalars[PARTS] = {};

    explicit Sums(const Slice &s)
        : along_outputs(width * s.inputs), along_inputs(width * s.outputs) {}
};

// Contract R = ∂L/∂D / d_p of a stretch of a row with A and B.
void contract_ratio(const Function &f, Index p, Index o, Index start, Index width,
                    const Real *__restrict ratio, Real *columns, Real *row) {
    for (Index h = 0; h < H; h++) {
        const Real b = f.b[(p * f.outputs + o) * H + h];
        const Real *__restrict a = f.a.data() + (p * H + h) * f.inputs + start;
        Real *__restrict column = columns + h * f.inputs;
        Real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (Index i = 0; i < width; i++) {
            column[i] = std::fma(ratio[i], b, column[i]);
            dot = std::fma(ratio[i], a[i], dot);
        }
        row[h] += dot;
    }
    Real *__restrict column = columns + H * f.inputs;
    Real total = 0;
#pragma omp simd reduction(+ : total)
    for (Index i = 0; i < width; i++) column[i] += ratio[i], total += ratio[i];
    row[H] += total;
}

// Add a stretch of a row to the sums. weight: α / τ times the normaliser, per column.
void differentiate(const Slice &s, const Function &f, const Selection &kept, Index part, Index o,
                   Index start, Index width, const Real *__restrict grad,
                   const Real *__restrict mean, const Real *__restrict weight, Sums &sums) {
    Tile t;
    evaluate(f, o, start, width, t);
    factors(kept, o, start, width, s.inputs, t);
    const Real scale = s.scale;
    Real offset = 0, moment = 0;
#pragma omp simd reduction(+ : offset, moment)
    for (Index i = 0; i < width; i++) {
        const Real direct = grad[i] * (t.slope[i] * scale);
        const Real logit = mixed ? (direct - mean[i]) * t.exponential[i] * weight[i] : 0;
        if (mixed) offset += direct;
        if (tempered) moment += logit * t.linear[i];
        t.merged[i] = direct + logit;
    }
    auto &scalars = sums.scalars[part];
    scalars.offset += offset, scalars.moment += moment;
    for (Index p = 0; p < P; p++) {
        Real *__restrict ratio = t.distance[p];
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index i = 0; i < width; i++) {
            if (learned) sum += t.merged[i] * ratio[i];
            ratio[i] = t.merged[i] / ratio[i];
        }
        scalars.distance[p] += sum;
        const Index piece = p * (H + 1);
        contract_ratio(f, p, o, start, width, ratio,
                       sums.along_outputs.at(part, piece * f.inputs + start),
                       sums.along_inputs.data() + o * Sums::width + piece);
    }
}

void write_gradients(const Slice &s, const Function &f, Sums &sums, Real *grad_a, Real *grad_b) {
    const Real *columns = sums.along_outputs.sum(s);
    for (Index p = 0; p < P; p++) {
        for (Index i = 0; i < s.inputs; i++)
            for (Index h = 0; h < H; h++) {
                const Real *sum = columns + p * (H + 1) * s.inputs + i;
                const Index at = (p * s.inputs + i) * H + h;
                grad_a[at] = f.coefficient[p] * (s.a[at] * sum[H * s.inputs] - sum[h * s.inputs]);
            }
        for (Index o = 0; o < s.outputs; o++)
            for (Index h = 0; h < H; h++) {
                const Real *sum = sums.along_inputs.data() + o * Sums::width + p * (H + 1);
                const Index at = (p * s.outputs + o) * H + h;
                grad_b[at] = f.coefficient[p] * (s.b[at] * sum[H] - sum[h]);
            }
    }
}

void write_scalars(const Slice &s, const Function &f, const Sums &sums, const Real *mean, Real *out) {
    double offset = 0, moment = 0, distance[P] = {}, scale = 0;
    for (const auto &part : sums.scalars) {
        offset += part.offset, moment += part.moment;
        for (Index p = 0; p < P; p++) distance[p] += part.distance[p];
    }
    for (Index i = 0; mixed && i < s.inputs; i++) scale += mean[i];
    if (mixed) *out++ = scale, *out++ = offset;
    if (mixed && tempered) *out++ = -moment * f.rate;
    for (Index p = 0; learned && p < P; p++) *out++ = distance[p];
}

// From dense = ∂L/∂(W + S) the gradients of A, B and the scalars; and base + scale * S once more.
void backward(const Slice &s, const Selection &kept, const Real *dense, const Real *base,
              Real *effective, Real *grad_a, Real *grad_b, Real *grad_scalars) {
    const Function f(s);
    std::vector<Real> mean(s.inputs), weight(s.inputs);
    if (mixed || effective) mean = softmax_mean(s, f, kept, dense, base, effective);
    for (Index i = 0; mixed && i < s.inputs; i++)
        weight[i] = f.normaliser[i] * f.scale * f.rate;
    Sums sums(s);
    for_tiles(s, [&](Index part, Index o, Index start, Index width) {
        differentiate(s, f, kept, part, o, start, width, dense + o * s.inputs + start,
                      mean.data() + start, weight.data() + start, sums);
    });
    write_gradients(s, f, sums, grad_a, grad_b);
    write_scalars(s, f, sums, mean.data(), grad_scalars);
}

}  // namespace

// W + S to `out`, and what was selected.
extern "C" void snella_forward(const Layer &l, const Index *budgets, const Real *base, Real *out,
                               double *selection) {
    for (Index n = 0; n < l.slices; n++) {
        const Slice s = slice_of(l, n);
        const Index size = s.size();
        Selection kept = {INFINITY, INFINITY, -1};
        if (form == none || budgets[n]) {
            Real *own = out + n * size;
            merge(s, own);
            kept = select(s, own, budgets[n]);
            finish(s, kept, own, share(base, n, size));
        } else {
            copy_base(share(base, n, size), size, out + n * size);
        }
        store(l, n, kept, selection);
    }
}

// The selection alone, which tests compare with others.
extern "C" void snella_select(const Layer &l, const Index *budgets, const Real *merged,
                              double *selection) {
    for (Index n = 0; n < l.slices; n++) {
        const Slice s = slice_of(l, n);
        store(l, n, select(s, merged + n * s.size(), budgets[n]), selection);
    }
}

// The gradients of A, B and the scalars, which come as zeros, and W + S if there is memory for it.
extern "C" void snella_backward(const Layer &l, const double *selection, const Real *dense,
                                const Real *base, Real *effective, Real *grad_a, Real *grad_b,
                                Real *grad_scalars) {
    for (Index n = 0; n < l.slices; n++) {
        const Slice s = slice_of(l, n);
        const Index size = s.size();
        const Selection kept = load(l, n, selection);
        Real *own = share(effective, n, size);
        if (kept.cut < 0) {
            copy_base(share(base, n, size), size, own);
            continue;
        }
        backward(s, kept, dense + n * size, share(base, n, size), own, grad_a + n * P * s.inputs * H,
                 grad_b + n * P * s.outputs * H, grad_scalars + n * K);
    }
}
