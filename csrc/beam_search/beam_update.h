// What becomes of the continuations that a step of a beam search found: one sentence, the same code on CPU and GPU.
//
// A sentence is worked on by a team: one thread on the CPU, the lanes of a warp on a GPU, which all come to each of the
// team's functions.
#pragma once

#include <cmath>

#include "beam_state.h"

#if defined(__CUDACC__)
#define CONDGEN_FAST_TEAMWORK __device__
#else
#define CONDGEN_FAST_TEAMWORK
#endif

namespace condgen_fast::beam_search {

struct Alone {
  static constexpr int lane = 0, width = 1;
  static void sync() {}
  static unsigned ballot(bool value) { return value; }
  static int first(unsigned) { return 0; }
  static int before(unsigned) { return 0; }
  static int count(unsigned mask) { return static_cast<int>(mask); }
  static float max(float value) { return value; }
  static void add_one(int64_t* value) { __atomic_fetch_add(value, 1, __ATOMIC_RELAXED); }
};

// Unnamed on purpose: a file of each kind of team includes it.
namespace {

// The nearest of 0 .. size - 1, so that a wrong number leads to no foreign memory; the CPU's ops refuse it.
CONDGEN_FAST_TEAMWORK inline int64_t within(int64_t value, int64_t size) {
  return value < 0 ? 0 : value < size ? value : size - 1;
}

CONDGEN_FAST_TEAMWORK inline int64_t within(int64_t value, int64_t size, bool* in_range) {
  *in_range &= value >= 0 && value < size;
  return within(value, size);
}

template <class Team>
class Sentence {
 public:
  CONDGEN_FAST_TEAMWORK Sentence(const Update& update, int64_t row, Team team)
      : u_(update),
        team_(team),
        row_(row),
        place_(within(update.sentences[row], update.batch)),
        limit_(within(update.sentences[update.rows + row], update.steps + 2)),
        step_(within(update.sentences[2 * update.rows + row], update.steps + 1)),
        beams_of_group_(update.beams / update.groups) {}

  CONDGEN_FAST_TEAMWORK void update() {
    if (step_ >= u_.steps) return;
    bool was_finished = true, finished = true;
    for (int64_t g = 0; g < u_.groups; ++g) {
      bool* done = u_.flags + row_ * u_.groups + g;
      bool* topped = done + u_.rows * u_.groups;
      const bool was_done = *done;
      bool on_top = *topped;
      if (!was_done) on_top |= finish(g);
      const float best = keep(g);
      const bool is_done = was_done || is_over(g, best, on_top);
      team_.sync();
      if (team_.lane == 0) {
        *done = is_done;
        *topped = on_top;
      }
      was_finished &= was_done;
      finished &= is_done;
    }
    team_.sync();
    if (u_.history_width > 0) move_history();
    if (u_.nodes_wanted) move_nodes();
    write_bans();
    write_ranges();
    if (team_.lane == 0) {
      u_.sentences[2 * u_.rows + row_] = step_ + 1;
      if (!was_finished) ++u_.progress[place_];
      if (finished && !was_finished) Team::add_one(u_.progress + u_.batch);
    }
  }

 private:
  const Update& u_;
  const Team team_;
  const int64_t row_, place_, limit_, step_, beams_of_group_;

  static CONDGEN_FAST_TEAMWORK float minus_infinity() { return -INFINITY; }

  CONDGEN_FAST_TEAMWORK bool is_end(int64_t token) const {
    for (int64_t i = 0; i < u_.ends_count; ++i) {
      if (u_.ends[i] == token) return true;
    }
    return false;
  }

  CONDGEN_FAST_TEAMWORK int64_t first_found(int64_t g) const { return (row_ * u_.groups + g) * u_.candidates; }
  CONDGEN_FAST_TEAMWORK int64_t first_finished(int64_t g) const { return (place_ * u_.groups + g) * u_.capacity; }

  // Puts those that end of the group's best into its finished list; whether the best of all is one of them.
  CONDGEN_FAST_TEAMWORK bool finish(int64_t g) {
    const int64_t first = first_found(g);
    const bool cut = u_.rules.cut_at_limit && limit_ == step_ + 1;
    int64_t room = u_.capacity;
    if (u_.rules.in_order) {
      const float* scores = u_.finished_totals + first_finished(g);
      while (room > 0 && scores[u_.capacity - room] > minus_infinity()) --room;
    }
    bool on_top = false;
    for (int64_t base = 0; base < beams_of_group_; base += Team::width) {
      const int64_t c = base + team_.lane;
      const bool ends = c < beams_of_group_ && u_.found_ranks[first + c] > minus_infinity() &&
                        (cut || is_end(u_.found_tokens[first + c]));
      for (unsigned mask = team_.ballot(ends); mask != 0 && room > 0; mask &= mask - 1) {
        const int64_t candidate = base + team_.first(mask);
        if (u_.rules.in_order) --room;
        on_top |= candidate == 0;
        insert(g, first + candidate);
      }
    }
    return on_top;
  }

  // Behind those that are as good, as they ended earlier or come first.
  CONDGEN_FAST_TEAMWORK void insert(int64_t g, int64_t candidate) {
    const int64_t first = first_finished(g), all = u_.batch * u_.groups * u_.capacity;
    int64_t* ids = u_.finished_ids + first;
    float* scores = u_.finished_totals + first;
    const float score = (u_.rules.by_rank ? u_.found_ranks : u_.found_sums)[candidate] / u_.norms[step_ + 1];
    if (!(score > scores[u_.capacity - 1])) return;
    int64_t place = 0;
    for (int64_t base = 0; base == place; base += Team::width) {
      const int64_t i = base + team_.lane;
      place += team_.count(team_.ballot(i < u_.capacity && scores[i] >= score));
    }
    for (int64_t last = u_.capacity - 1; last > place; last -= Team::width) {
      const int64_t i = last - team_.lane, from = i > place ? i - 1 : i;
      const bool moves = i > place;
      int64_t parent = 0, token = 0, length = 0;
      float moved = 0, sum = 0;
      if (moves) {
        parent = ids[from], token = ids[all + from], length = ids[2 * all + from];
        moved = scores[from], sum = scores[all + from];
      }
      team_.sync();
      if (moves) {
        ids[i] = parent, ids[all + i] = token, ids[2 * all + i] = length;
        scores[i] = moved, scores[all + i] = sum;
      }
      team_.sync();
    }
    if (team_.lane == 0) {
      ids[place] = within(u_.found_parents[candidate], u_.beams);
      ids[all + place] = u_.found_tokens[candidate];
      ids[2 * all + place] = step_ + 1;
      scores[place] = score;
      scores[all + place] = u_.found_sums[candidate];
    }
    team_.sync();
  }

  // Keeps the group's best that do not end, and returns the best value of them. Where there are too few, places hold
  // what comes first of the others, with -inf.
  CONDGEN_FAST_TEAMWORK float keep(int64_t g) {
    const int64_t first = first_found(g);
    int64_t kept = 0;
    float best = minus_infinity();
    for (int wanted = 1; wanted >= 0; --wanted) {
      for (int64_t base = 0; base < u_.candidates && kept < beams_of_group_; base += Team::width) {
        const int64_t c = base + team_.lane;
        const bool inside = c < u_.candidates;
        const bool alive =
            inside && u_.found_ranks[first + c] > minus_infinity() && !is_end(u_.found_tokens[first + c]);
        const bool taken = inside && alive == (wanted == 1);
        const unsigned mask = team_.ballot(taken);
        const int64_t place = kept + team_.before(mask);
        if (taken && place < beams_of_group_) {
          const float value = write(g * beams_of_group_ + place, first + c, alive);
          best = value > best ? value : best;
        }
        kept += team_.count(mask);
      }
    }
    return team_.max(best);
  }

  CONDGEN_FAST_TEAMWORK float write(int64_t beam, int64_t candidate, bool alive) {
    const int64_t all = u_.rows * u_.beams, i = row_ * u_.beams + beam;
    const int64_t column = u_.batch * u_.beams, in_lattice = step_ * column + place_ * u_.beams + beam;
    const int64_t token = u_.found_tokens[candidate], parent = within(u_.found_parents[candidate], u_.beams);
    const float sum = alive ? u_.found_sums[candidate] : minus_infinity();
    const float rank = alive ? u_.found_ranks[candidate] : minus_infinity();
    u_.chosen[i] = token;
    u_.chosen[all + i] = parent;
    u_.totals[i] = sum;
    u_.lattice_ids[in_lattice] = token;
    u_.lattice_ids[u_.steps * column + in_lattice] = parent;
    u_.lattice_totals[in_lattice] = sum;
    if (u_.ranked) {
      u_.totals[all + i] = rank;
      u_.lattice_totals[u_.steps * column + in_lattice] = rank;
    }
    return u_.rules.by_rank ? rank : sum;
  }

  // Whether nothing better can come of the group; beam_update of reference.py says why.
  CONDGEN_FAST_TEAMWORK bool is_over(int64_t g, float best, bool on_top) const {
    const Rules& rules = u_.rules;
    const int64_t length = step_ + 1;
    const float* scores = u_.finished_totals + first_finished(g);
    if (limit_ <= length) return true;
    if (rules.stopping == kTopped) return on_top && scores[rules.n_best - 1] > minus_infinity();
    if (best == minus_infinity()) return true;
    const float last = scores[rules.wanted - 1];
    if (rules.stopping == kFirst) return last > minus_infinity();
    if (rules.stopping == kHeuristic) return last > minus_infinity() && last >= best / u_.norms[length];
    const int64_t shortest = length + 1 > rules.min_length ? length + 1 : rules.min_length;
    const float norm = u_.norms[rules.rising || limit_ < shortest ? limit_ : shortest];
    return scores[rules.n_best - 1] >= best / norm;
  }

  // Tokens that a hypothesis has before this step's.
  CONDGEN_FAST_TEAMWORK int64_t known() const { return u_.history_width - u_.steps + step_; }
  CONDGEN_FAST_TEAMWORK int64_t token(int64_t beam) const { return u_.chosen[row_ * u_.beams + beam]; }
  CONDGEN_FAST_TEAMWORK int64_t parent(int64_t beam) const { return u_.chosen[(u_.rows + row_) * u_.beams + beam]; }

  CONDGEN_FAST_TEAMWORK void move_history() {
    const int64_t width = u_.history_width, of_row = u_.beams * width;
    int64_t *history = u_.history + row_ * of_row, *moved = history + u_.rows * of_row;
    for (int64_t beam = 0; beam < u_.beams; ++beam) {
      const int64_t* from = history + parent(beam) * width;
      for (int64_t i = team_.lane; i < known(); i += Team::width) moved[beam * width + i] = from[i];
    }
    team_.sync();
    for (int64_t beam = 0; beam < u_.beams; ++beam) {
      for (int64_t i = team_.lane; i < known(); i += Team::width) history[beam * width + i] = moved[beam * width + i];
      if (team_.lane == 0) history[beam * width + known()] = token(beam);
    }
    team_.sync();
  }

  CONDGEN_FAST_TEAMWORK bool is_forced(int64_t step) const {
    return u_.rules.longest_prefix > 0 && u_.prefix_lengths[place_] > step;
  }

  CONDGEN_FAST_TEAMWORK int64_t of_trie(int64_t node) const {
    return node < u_.rules.trie_nodes ? node : u_.rules.trie_nodes - 1;
  }

  CONDGEN_FAST_TEAMWORK void move_nodes() {
    int64_t *nodes = u_.nodes + row_ * u_.beams, *moved = nodes + u_.rows * u_.beams;
    const bool forced = is_forced(step_);
    for (int64_t beam = team_.lane; beam < u_.beams; beam += Team::width) {
      const int64_t node = of_trie(nodes[parent(beam)]);
      moved[beam] = forced || node < 0 ? node : follow(node, token(beam));
    }
    team_.sync();
    for (int64_t beam = team_.lane; beam < u_.beams; beam += Team::width) nodes[beam] = moved[beam];
    team_.sync();
  }

  // Where in the trie a token leads to, which is a child of the node or of no hypothesis.
  CONDGEN_FAST_TEAMWORK int64_t follow(int64_t node, int64_t token) const {
    const int64_t stride = u_.rules.trie_stride, edges = u_.trie_edges;
    const int64_t *keys = u_.trie + 2 * u_.rules.trie_nodes + 1, *targets = keys + edges;
    const int64_t wanted = node * stride + (token < stride ? token : stride - 1);
    int64_t low = 0, high = edges;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return targets[low < edges ? low : edges - 1];
  }

  // What must not be generated at the next step.
  CONDGEN_FAST_TEAMWORK void write_bans() {
    const int64_t step = step_ + 1;
    const bool forced = is_forced(step), early = step + 1 < u_.rules.min_length && limit_ != step + 1;
    for (int64_t list = 0; list < u_.ban_lists; ++list) {
      int64_t* bans = u_.bans + (row_ * u_.ban_lists + list) * u_.bans_count;
      for (int64_t i = team_.lane; i < u_.bans_count; i += Team::width) {
        int64_t token = -1;
        if (!forced && i < u_.banned_count) {
          if (i < u_.rules.always_banned || early) token = u_.banned[i];
        } else if (!forced) {
          token = repeating(list, i - u_.banned_count);
        }
        bans[i] = token;
      }
    }
  }

  // The last of the n tokens from `begin` on, where those before it are the newest; otherwise -1.
  CONDGEN_FAST_TEAMWORK int64_t repeating(int64_t beam, int64_t begin) const {
    const int64_t n = u_.rules.no_repeat_ngram, count = known() + 1;
    if (begin + n > count) return -1;
    const int64_t* tokens = u_.history + (row_ * u_.beams + beam) * u_.history_width;
    for (int64_t i = 0; i < n - 1; ++i) {
      if (tokens[begin + i] != tokens[count - n + 1 + i]) return -1;
    }
    return tokens[begin + n - 1];
  }

  // What the hypotheses are restricted to at the next step, places in the list of ends, prefixes and children.
  CONDGEN_FAST_TEAMWORK void write_ranges() {
    if (!u_.ranges_wanted) return;
    const int64_t step = step_ + 1, prefixes = u_.ends_count, children = prefixes + u_.batch * u_.rules.longest_prefix;
    const bool forced = is_forced(step), only_ends = !u_.rules.cut_at_limit && limit_ == step + 1;
    int64_t *firsts = u_.ranges + row_ * u_.beams, *lasts = firsts + u_.rows * u_.beams;
    for (int64_t beam = team_.lane; beam < u_.beams; beam += Team::width) {
      const int64_t node = u_.nodes_wanted ? of_trie(u_.nodes[row_ * u_.beams + beam]) : -1;
      int64_t first = -1, last = -1;
      if (forced) {
        first = prefixes + place_ * u_.rules.longest_prefix + step;
        last = first + 1;
      } else if (node >= 0) {  // its ends come first
        first = children + u_.trie[node];
        last = only_ends ? first + u_.trie[u_.rules.trie_nodes + 1 + node] : children + u_.trie[node + 1];
      } else if (only_ends) {
        first = 0;
        last = u_.ends_count;
      }
      firsts[beam] = first;
      lasts[beam] = last;
    }
  }
};

}  // namespace
}  // namespace condgen_fast::beam_search
