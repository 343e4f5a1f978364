// A row, its memory, and the first sweep over it, which finds the powers of all tokens and their sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "kd_loss.h"
#include "reals.h"
#include "sweeps.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

constexpr double kInfinity = INFINITY, kLn2 = 0.6931471805599453;

// Logits of a row, -inf from width on
struct RowOfLogits {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t width = 0;

  RowOfLogits() = default;
  RowOfLogits(const void* first, Dtype type, int64_t columns) : data(first), dtype(type), width(columns) {}
  RowOfLogits(const Logits& logits, int64_t n)
      : RowOfLogits(static_cast<const char*>(logits.data) + offset_of_row(logits, n), logits.dtype, logits.width) {}

  // Calls body(pointer to the first logit).
  template <class Real, class Body>
  auto with(const Body& body) const {
    if constexpr (std::is_same_v<Real, double>) {
      return body(static_cast<const double*>(data));
    } else {
      if (dtype == Dtype::kBFloat16) return body(static_cast<const simd::BFloat16*>(data));
      if (dtype == Dtype::kHalf) return body(static_cast<const simd::Half*>(data));
      return body(static_cast<const float*>(data));
    }
  }
  template <class Real>
  Real at(int64_t i) const {
    return with<Real>([&](auto* row) { return i < width ? to_real<Real>(row[i]) : Real(-INFINITY); });
  }
  template <class Real>
  const Real* read(int64_t begin, int64_t count, Real* buffer, Real& highest) const {
    const int64_t inside = std::clamp<int64_t>(width - begin, 0, count);
    return with<Real>([&](auto* row) { return read_block(row + begin, inside, count, buffer, highest); });
  }
  // The first token with this logit, -1 without
  template <class Real>
  int64_t find(Real logit) const {
    return with<Real>([&](auto* row) {
      const auto* found = std::find_if(row, row + width, [&](auto x) { return to_real<Real>(x) == logit; });
      return found == row + width ? int64_t{-1} : static_cast<int64_t>(found - row);
    });
  }
  Ahead ahead(int64_t begin) const { return {static_cast<const char*>(data) + begin * size_of(dtype), size_of(dtype)}; }
};

// By logits, or by log-probabilities, which are not normalised
struct Teacher {
  RowOfLogits logits, next;
  double temperature = 1;
  bool normalise = true;
};

// A block of a row after the first sweep
struct Block {
  BlockSums sums;
  double student_shift, teacher_shift;  // -inf: no finite logit so far
  double student_moved, teacher_moved;  // log2 of what takes its powers to the shifts of the row
  double p_factor, q_factor, h_factor;  // what takes them to probabilities
};

// Uninitialised memory from the start of a cache line on
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : memory_(::operator new(bytes, kLine)) {}
  template <class T>
  T* as() {
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<void, Delete> memory_;
};

template <class Real>
struct Scratch {
  int64_t padded;  // columns
  Aligned powers, student_block, teacher_block, gradient_block;
  std::vector<Real> listed_row;
  std::vector<Block> blocks;

  explicit Scratch(int64_t width)
      : padded((width + kBlock - 1) / kBlock * kBlock),
        powers(3 * padded * sizeof(Real)),
        student_block(kBlock * sizeof(Real)),
        teacher_block(kBlock * sizeof(Real)),
        gradient_block(kBlock * sizeof(Real)),
        blocks(padded / kBlock) {}
  Powers<Real> at(int64_t begin) {
    Real* e = powers.as<Real>() + begin;
    return {e, e + padded, e + 2 * padded};
  }
};

// p are the probabilities of the student, h those at temperature 1, q those of the teacher; logarithms are of base 2.
template <class Real>
struct Sweep {
  RowOfLogits student, next_student;
  const Teacher* teacher;  // or null
  Hard hard;
  Real factor, teacher_factor;  // log2 e / temperature
  Scratch<Real>& scratch;

  // What run() finds
  double shift = 0, teacher_shift = 0;  // the highest logits
  double log_e = 0, log_h = 0;          // of the sums of 2^z, and of that at temperature 1
  double log_q = 0;                     // log2 q = y - log_q
  double mass = 0;                      // of the teacher
  double dot = 0;                       // of the divergence: sum of q * z, q * (y - z) or p * (z - y)
  double x = 0;                         // sum of s - shift
  double p_z = 0, q_y = 0;              // sums

  bool dead() const { return log_e == -kInfinity; }  // no probability at all
  double log_p(int64_t i) const { return (student.at<Real>(i) - shift) * factor - log_e; }
  double log_teacher(int64_t i) const {
    return mass == 0 ? -kInfinity : (teacher->logits.template at<Real>(i) - teacher_shift) * teacher_factor - log_q;
  }

  // before_block(begin) is called before the powers of a block are written.
  template <class BeforeBlock>
  void run(Divergence divergence, bool want_x, bool want_entropies, const BeforeBlock& before_block) {
    const int64_t width = student.width;
    const bool short_student = student.dtype == Dtype::kBFloat16 || student.dtype == Dtype::kHalf;
    const Detail detail = want_entropies ? Detail::kEntropies : short_student ? Detail::kShort : Detail::kPlain;
    Real highest = -INFINITY, teacher_highest = -INFINITY;
    for (int64_t begin = 0; begin < width; begin += kBlock) {
      const int64_t count = std::min(kBlock, width - begin), ahead = begin + kBlock;
      const int64_t padded = (count + kStep<Real> - 1) / kStep<Real> * kStep<Real>;
      const bool last = ahead >= width;
      Exponents<Real> s{}, t{};
      s.logits = student.read(begin, padded, scratch.student_block.template as<Real>(), highest);
      s.shift = highest == Real(-INFINITY) ? 0 : highest;
      s.factor = factor;
      s.ahead = last ? next_student.ahead(0) : student.ahead(ahead);
      if (teacher) {
        t.logits = teacher->logits.read(begin, padded, scratch.teacher_block.template as<Real>(), teacher_highest);
        t.shift = teacher_highest == Real(-INFINITY) ? 0 : teacher_highest;
        t.factor = teacher_factor;
        t.ahead = last ? teacher->next.ahead(0) : teacher->logits.ahead(ahead);
      }
      before_block(begin);
      Block& block = scratch.blocks[begin / kBlock];
      block.sums = exponentials(teacher != nullptr, divergence, hard, detail, s, t, padded, scratch.at(begin));
      if (!want_x) {
        block.sums.x = 0;
      } else if (teacher || count < padded) {
        block.sums.x = sum_of(s.logits, count, s.shift);
      }
      block.student_shift = highest;
      block.teacher_shift = teacher_highest;
    }
    shift = highest;
    teacher_shift = teacher_highest;
    add_up(divergence);
  }

 private:
  static double moved(double from, double to, double by) { return from == to ? 0 : (from - to) * by; }
  static double power(double x) { return x == 0 ? 1 : std::exp2(x); }

  void add_up(Divergence divergence) {
    const double log2_e = Real(kLog2E);
    double e = 0, h = 0, q = 0;
    dot = x = p_z = q_y = 0;  // a row may be swept again
    for (size_t i = 0; i < scratch.blocks.size(); ++i) {
      Block& block = scratch.blocks[i];
      const BlockSums& sums = block.sums;
      const double z = block.student_moved = moved(block.student_shift, shift, factor);
      const double y = block.teacher_moved = moved(block.teacher_shift, teacher_shift, teacher_factor);
      const double to_e = power(z), to_q = power(y);
      const double to_h = hard == Hard::kSame     ? to_e
                          : hard == Hard::kSquare ? to_e * to_e
                                                  : power(moved(block.student_shift, shift, log2_e));
      block.p_factor = to_e, block.q_factor = to_q, block.h_factor = to_h;
      e += to_e * sums.e;
      h += to_h * sums.h;
      q += to_q * sums.q;
      const int64_t count = std::min<int64_t>(kBlock, student.width - i * kBlock);
      x += block.student_shift == -kInfinity ? -kInfinity : sums.x + count * (block.student_shift - shift);
      const bool student_counts = to_e != 0 && sums.e != 0, teacher_counts = to_q != 0 && sums.q != 0;
      if (student_counts) p_z += to_e * (sums.e_z + z * sums.e);
      if (teacher_counts) q_y += to_q * (sums.q_y + y * sums.q);
      if (divergence == Divergence::kReverseKl) {
        if (student_counts) dot += to_e * (sums.dot + (z - y) * sums.e);
      } else if (teacher_counts) {
        dot += to_q * (sums.dot + (divergence == Divergence::kForwardKl ? y - z : z) * sums.q);
      }
    }
    log_e = std::log2(e);
    log_h = hard == Hard::kNone ? 0 : std::log2(h);
    if (!teacher || q == 0) {
      log_q = 0;
    } else {
      log_q = teacher->normalise ? std::log2(q) : -teacher_shift * teacher_factor;
    }
    const double to_q = std::exp2(-log_q);
    mass = q == 0 ? 0 : teacher->normalise ? q / q : q * to_q;
    q_y *= to_q;
    p_z /= e;
    dot *= divergence == Divergence::kReverseKl ? 1 / e : to_q;
    for (Block& block : scratch.blocks) {
      block.p_factor /= e;
      block.h_factor /= h;
      block.q_factor *= to_q;
    }
  }
};

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
