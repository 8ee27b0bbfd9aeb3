// DKM's passes over the vectors of one layer, for float32 on a CPU; plain.py has the same in PyTorch.
// It is compiled for one shape of the codebook: K centroids of D numbers, with fused multiply-adds.
//
// Vectors lie in blocks: number a of vector i of block b is w[(b * D + a) * m + i], so that a vector register holds
// one number of 16 vectors. A pass gives float64 sums per piece of at most PIECE vectors, and the caller adds the
// pieces in order: the same result whatever the number of threads.

#include <cstdint>
#include <cstring>

constexpr int LANES = 16, PIECE = 4096;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

static inline Floats load(const float* p, int count) {
  Floats v = {};
  if (count == LANES) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, count * sizeof(float));
  return v;
}

static inline void store(float* p, Floats v, int count) {
  if (count == LANES) memcpy(p, &v, sizeof v);
  else memcpy(p, &v, count * sizeof(float));
}

// 2^x for x <= 0 with a relative error of 2e-7; below -60 it is 2^-60, so that its products with gradients are no
// denormal numbers either, which take several times as long.
static inline Floats exp2_(Floats x) {
  x = x < -60.0f ? Floats{} - 60.0f : x;
  Ints whole = __builtin_convertvector(x - 0.5f, Ints);
  Floats f = x - __builtin_convertvector(whole, Floats);
  Floats p = f * 0.00132765f + 0.00967554f;
  p = p * f + 0.05550713f;
  p = p * f + 0.2402212f;
  p = p * f + 0.69314697f;
  p = p * f + 1.00000007f;
  return (Floats)((Ints)p + (whole << 23));
}

// Numbers that are equal for all vectors: the centroids and what the gradient adds per centroid.
struct Row { float at[K][D]; };

// e: softmax(-|x - c|^2 / temperature) over the centroids, before its division by the sum; returns that divisor's
// inverse, 0 in the lanes past `count`. sharpness = log2(e) / temperature.
static inline Floats attention(const Floats* x, const Row& c, float sharpness, int count, Floats* e) {
  Floats least = {};
#pragma GCC unroll 16
  for (int j = 0; j < K; j++) {
    Floats s = {};
#pragma GCC unroll 16
    for (int a = 0; a < D; a++) {
      Floats t = x[a] - c.at[j][a];
      s = t * t + s;
    }
    e[j] = s;
    least = j == 0 ? s : (s < least ? s : least);
  }
  Floats z = {};
#pragma GCC unroll 16
  for (int j = 0; j < K; j++) {
    e[j] = exp2_((least - e[j]) * sharpness);
    z += e[j];
  }
  z = 1.0f / z;
  if (count < LANES)
    for (int i = count; i < LANES; i++) z[i] = 0;
  return z;
}

static inline double total(Floats v) {
  double s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

template <class Body> static void pieces(int64_t blocks, int64_t m, int64_t threads, Body body) {
  int64_t per = (m + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < blocks * per; p++) {
    int64_t begin = p % per * PIECE;
    body(p, p / per, begin, begin + PIECE < m ? begin + PIECE : m);
  }
}

// out[piece][j][e] = sum over the piece of A[., j] x[., e]; with ONES, e = 0 is the sum of A alone.
// Loops over centroids stay rolled outside `attention`: their accumulators unrolled would spill, at twice the time.
template <int E, bool ONES>
static void sums(const float* w, const float* x, const Row* c, float sharpness, double* out, int64_t blocks,
                 int64_t m, int64_t threads) {
  constexpr int WIDTH = E + ONES;
  pieces(blocks, m, threads, [=](int64_t piece, int64_t b, int64_t begin, int64_t end) {
    Floats acc[K][WIDTH] = {}, v[D], y[E], e[K];
    for (int64_t i = begin; i < end; i += LANES) {
      int count = end - i < LANES ? end - i : LANES;
      for (int a = 0; a < D; a++) v[a] = load(w + (b * D + a) * m + i, count);
      for (int a = 0; a < E; a++) y[a] = ONES ? v[a] : load(x + (b * E + a) * m + i, count);
      Floats r = attention(v, *c, sharpness, count, e);
#pragma GCC unroll 4
      for (int j = 0; j < K; j++) {
        Floats A = e[j] * r;
        if (ONES) acc[j][0] += A;
#pragma GCC unroll 16
        for (int a = 0; a < E; a++) acc[j][a + ONES] = A * y[a] + acc[j][a + ONES];
      }
    }
    for (int j = 0; j < K; j++)
      for (int a = 0; a < WIDTH; a++) out[(piece * K + j) * WIDTH + a] = total(acc[j][a]);
  });
}

// dw = [dw +] sum_j A_j u_j + slope sum_j z_j c_j, where z_j = A_j (q_j - sum_l A_l q_l) and q_j = g.next_j + w.u_j + v_j;
// out[piece][j] = slope sum z_j (w - c_j), where it is wanted.
template <bool GRAD, bool SUMS>
static void back(const float* w, const float* g, const Row* c, const Row* next, const Row* u, const float* v,
                 float sharpness, float slope, float* dw, double* out, int64_t blocks, int64_t m, int64_t threads) {
  pieces(blocks, m, threads, [=](int64_t piece, int64_t b, int64_t begin, int64_t end) {
    Floats acc[K][D] = {}, x[D], y[D] = {}, e[K], q[K];
    for (int64_t i = begin; i < end; i += LANES) {
      int count = end - i < LANES ? end - i : LANES;
      for (int a = 0; a < D; a++) x[a] = load(w + (b * D + a) * m + i, count);
      if (GRAD)
        for (int a = 0; a < D; a++) y[a] = load(g + (b * D + a) * m + i, count);
      Floats r = attention(x, *c, sharpness, count, e), mean = {}, d[D] = {};
#pragma GCC unroll 4
      for (int j = 0; j < K; j++) {
        Floats s = Floats{} + v[j];
#pragma GCC unroll 16
        for (int a = 0; a < D; a++) {
          s = x[a] * u->at[j][a] + s;
          if (GRAD) s = y[a] * next->at[j][a] + s;
        }
        q[j] = s;
        e[j] *= r;
        mean = e[j] * s + mean;
      }
#pragma GCC unroll 4
      for (int j = 0; j < K; j++) {
        Floats z = e[j] * (q[j] - mean) * slope;
#pragma GCC unroll 16
        for (int a = 0; a < D; a++) {
          d[a] = z * c->at[j][a] + (e[j] * u->at[j][a] + d[a]);
          if (SUMS) acc[j][a] = z * (x[a] - c->at[j][a]) + acc[j][a];
        }
      }
      for (int a = 0; a < D; a++) {
        float* to = dw + (b * D + a) * m + i;
        store(to, GRAD ? d[a] : d[a] + load(to, count), count);
      }
    }
    if (SUMS)
      for (int j = 0; j < K; j++)
        for (int a = 0; a < D; a++) out[(piece * K + j) * D + a] = total(acc[j][a]);
  });
}

extern "C" {

// Sums of A and of A w: out[piece][K][1 + D].
void r2_sums(const float* w, const Row* c, float sharpness, double* out, int64_t blocks, int64_t m, int64_t threads) {
  sums<D, true>(w, w, c, sharpness, out, blocks, m, threads);
}

// Sums of A x, x as wide as the vectors: out[piece][K][D].
void r2_pull(const float* w, const float* x, const Row* c, float sharpness, double* out, int64_t blocks, int64_t m,
             int64_t threads) {
  sums<D, false>(w, x, c, sharpness, out, blocks, m, threads);
}

// y = A next.
void r2_output(const float* w, const Row* c, const Row* next, float sharpness, float* y, int64_t blocks, int64_t m,
               int64_t threads) {
  pieces(blocks, m, threads, [=](int64_t, int64_t b, int64_t begin, int64_t end) {
    Floats x[D], e[K];
    for (int64_t i = begin; i < end; i += LANES) {
      int count = end - i < LANES ? end - i : LANES;
      for (int a = 0; a < D; a++) x[a] = load(w + (b * D + a) * m + i, count);
      Floats r = attention(x, *c, sharpness, count, e), s[D] = {};
      for (int j = 0; j < K; j++)
#pragma GCC unroll 16
        for (int a = 0; a < D; a++) s[a] = e[j] * next->at[j][a] + s[a];
      for (int a = 0; a < D; a++) store(y + (b * D + a) * m + i, s[a] * r, count);
    }
  });
}

// One iteration backwards; g is null but for the last iteration, which starts dw; out is null where not wanted.
void r2_back(const float* w, const float* g, const Row* c, const Row* next, const Row* u, const float* v,
             float sharpness, float slope, float* dw, double* out, int64_t blocks, int64_t m, int64_t threads) {
  auto pass = g ? (out ? back<true, true> : back<true, false>) : (out ? back<false, true> : back<false, false>);
  pass(w, g, c, next, u, v, sharpness, slope, dw, out, blocks, m, threads);
}
}

#if D == 1
// The functions of one number on a grid (passes.py, Grid): nodes x, cells between them.

constexpr int PARTS = 4;
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
struct Cell { double mass, moment; };

static inline Four position(const float* w, float scale, int64_t first, int32_t* cell) {
  Four q = {w[0], w[1], w[2], w[3]};
  q *= scale;  // a power of two: exact, and so is the fraction below
  FourInts i = __builtin_convertvector(q, FourInts);
  Four f = q - __builtin_convertvector(i, Four);
  FourInts down = f < 0.0f;
  i += down;
  f -= __builtin_convertvector(down, Four);
  i -= (int32_t)first;
  memcpy(cell, &i, sizeof i);
  return f;
}

template <class Body> static void fours(int64_t begin, int64_t end, const float* w, Body body) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) body(i, w + i, 4);
  if (i == end) return;
  float last[4] = {w[i], w[i], w[i], w[i]};
  memcpy(last, w + i, (end - i) * sizeof(float));
  body(i, last, end - i);
}

// Four cubics at four fractions; a row of the table has the coefficients of one cell, or of two functions.
static inline Four cubic(const float* table, int width, const int32_t* cell, Four f) {
  Four a, b, c, d;
  memcpy(&a, table + width * (int64_t)cell[0], 16);
  memcpy(&b, table + width * (int64_t)cell[1], 16);
  memcpy(&c, table + width * (int64_t)cell[2], 16);
  memcpy(&d, table + width * (int64_t)cell[3], 16);
  Four p = __builtin_shufflevector(a, b, 0, 4, 1, 5), q = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  Four r = __builtin_shufflevector(a, b, 2, 6, 3, 7), s = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  Four c0 = __builtin_shufflevector(p, q, 0, 1, 4, 5), c1 = __builtin_shufflevector(p, q, 2, 3, 6, 7);
  Four c2 = __builtin_shufflevector(r, s, 0, 1, 4, 5), c3 = __builtin_shufflevector(r, s, 2, 3, 6, 7);
  return ((c3 * f + c2) * f + c1) * f + c0;
}

// Coefficients of the cubic in every cell, through the nodes before, at, after and beyond it.
static void cubics(const float* y, int64_t size, int width, float* table) {
  for (int64_t i = 1; i + 2 < size; i++) {
    float a = y[i - 1], b = y[i], c = y[i + 1], d = y[i + 2], *row = table + width * i;
    row[0] = b;
    row[1] = c - a / 3 - b / 2 - d / 6;
    row[2] = (a + c) / 2 - b;
    row[3] = (d - a) / 6 + (b - c) / 2;
  }
}

extern "C" {

// cells[part][cell] += (g, g fraction); g = 1 where it is null.
void r2_grid_deposit(const float* w, const float* g, float scale, int64_t first, Cell* cells, int64_t size, int64_t n,
                     int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int part = 0; part < PARTS; part++) {
    Cell* own = cells + part * size;
    fours(n * part / PARTS, n * (part + 1) / PARTS, w, [=](int64_t i, const float* x, int count) {
      int32_t cell[4];
      Four f = position(x, scale, first, cell);
      for (int l = 0; l < count; l++) {
        double mass = g ? g[i + l] : 1.0;
        own[cell[l]].mass += mass;
        own[cell[l]].moment += mass * f[l];
      }
    });
  }
}

// out = y(w), or g y(w) + z(w) where there is g; y and z are given at the nodes, table is room for their cubics.
void r2_grid_lookup(const float* w, const float* g, float scale, int64_t first, const float* y, const float* z,
                    float* table, int64_t size, float* out, int64_t n, int64_t threads) {
  int width = g ? 8 : 4;
  cubics(y, size, width, table);
  if (g) cubics(z, size, width, table + 4);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int part = 0; part < PARTS; part++)
    fours(n * part / PARTS, n * (part + 1) / PARTS, w, [=](int64_t i, const float* x, int count) {
      int32_t cell[4];
      Four f = position(x, scale, first, cell), s = cubic(table, width, cell, f);
      if (g) {
        Four h = {};
        memcpy(&h, g + i, count * sizeof(float));
        s = s * h + cubic(table + 4, width, cell, f);
      }
      memcpy(out + i, &s, count * sizeof(float));
    });
}

// Sums of A mass and of A mass x over the nodes; x has the rows (mass, mass x): out[piece][K][2].
void r2_grid_sums(const float* nodes, const float* x, const Row* c, float sharpness, double* out, int64_t m,
                  int64_t threads) {
  sums<2, false>(nodes, x, c, sharpness, out, 1, m, threads);
}

// One iteration backwards at the nodes: alpha += what `back` adds without g, beta = what it multiplies g by.
// out[piece][j] = slope sum (mass z_j + g A_j (next_j - y)) (x - c_j); beta and g are null but for the last iteration.
void r2_grid_back(const float* nodes, const float* mass, const float* g, const Row* c, const Row* next, const Row* u,
                  const float* v, float sharpness, float slope, float* alpha, float* beta, double* out, int64_t m,
                  int64_t threads) {
  pieces(1, m, threads, [=](int64_t piece, int64_t, int64_t begin, int64_t end) {
    Floats acc[K] = {}, e[K];
    for (int64_t i = begin; i < end; i += LANES) {
      int count = end - i < LANES ? end - i : LANES;
      Floats x = load(nodes + i, count), n = load(mass + i, count), h = {};
      if (g) h = load(g + i, count);
      Floats r = attention(&x, *c, sharpness, count, e), mean = {}, y = {}, d = {}, s = {};
      for (int j = 0; j < K; j++) {
        e[j] *= r;
        mean += e[j] * (x * u->at[j][0] + v[j]);
        y += e[j] * next->at[j][0];
      }
      for (int j = 0; j < K; j++) {
        Floats z = e[j] * (x * u->at[j][0] + v[j] - mean), t = e[j] * (next->at[j][0] - y);
        d += e[j] * u->at[j][0] + z * slope * c->at[j][0];
        s += t * slope * c->at[j][0];
        acc[j] += (z * n + t * h) * slope * (x - c->at[j][0]);
      }
      store(alpha + i, d + load(alpha + i, count), count);
      if (g) store(beta + i, s, count);
    }
    for (int j = 0; j < K; j++) out[piece * K + j] = total(acc[j]);
  });
}
}
#endif
