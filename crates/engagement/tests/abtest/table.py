"""Writes the numbers that the tests of the A/B statistics are held against.

    python3 -m venv venv && venv/bin/pip install scipy==1.17.1
    venv/bin/python crates/engagement/tests/abtest/table.py > crates/engagement/tests/abtest/table.csv

P(best) and the expected loss are integrals of SciPy's own beta distribution by its adaptive
quadrature, cut at the quantiles of each variant; nothing here shares code or method with the crate.
"""
from scipy import integrate, stats

PAIRS = [(1, 1), (1, 1001), (3, 500), (21, 981), (51, 951), (0.5, 0.5), (2001, 8001),
         (20_001, 980_001), (1, 1_000_001), (5_000_001, 5_000_001), (101, 1)]


def row(name, *numbers):
    print(",".join([name, *(repr(float(n)) for n in numbers)]))


for a, b in PAIRS:
    d = stats.beta(a, b)
    for q in (1e-6, 0.025, 0.3, 0.5, 0.9, 0.975, 0.999):
        x = d.ppf(q)
        if 0 < x < 1:
            row("beta_cdf", a, b, x, d.cdf(x))
            row("beta_pdf", a, b, x, d.pdf(x))
            row("beta_ppf", a, b, q, x)
for k in (1, 2, 7):
    for x in (1e-4, 0.1, 1.0, 3.84, 5.0, 10.8, 30.0, 80.0):
        row("chi2_sf", k, x, stats.chi2(k).sf(x))
for z in (-8.0, -3.0, -1.96, -0.5, -0.01, 0.0, 0.3, 1.0, 2.24, 4.0):
    row("norm_cdf", z, stats.norm.cdf(z))

CASES = [
    [(1000, 20), (1000, 30)], [(5000, 100), (5000, 120)], [(100, 0), (100, 1)], [(10, 0), (10, 0)],
    [(500, 100), (500, 150)], [(1_000_000, 20_000), (1_000_000, 20_400)], [(0, 0), (1000, 20)],
    [(1, 1), (1000, 500)], [(50, 5), (1_000_000, 100_000)], [(10_000, 300), (10_000, 301)],
    [(1000, 200), (1000, 210), (1000, 220)], [(400, 8), (400, 9), (400, 12), (400, 3)],
    [(2000, 40), (2100, 44), (1900, 60), (2000, 41), (2000, 39)],
    [(1250, 25 + i) for i in range(8)],
]


def p_best(case):
    betas = [stats.beta(1 + s, 1 + n - s) for n, s in case]
    cuts = sorted({x for d in betas for x in d.ppf([1e-15, 1e-6, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6])}
                  | {d.isf(1e-15) for d in betas} | {0.0, 1.0})

    def over(f):
        parts = (integrate.quad(f, lo, hi, epsabs=1e-15, epsrel=1e-12, limit=400)[0] for lo, hi in zip(cuts, cuts[1:]))
        return sum(parts)

    def product(x, but=None):
        out = 1.0
        for i, d in enumerate(betas):
            out *= 1.0 if i == but else d.cdf(x)
        return out

    best = [over(lambda x, i=i: betas[i].pdf(x) * product(x, i)) for i in range(len(betas))]
    top = over(lambda x: 1 - product(x))
    return best, [top - d.mean() for d in betas]


for case in CASES:
    best, loss = p_best(case)
    row("p_best", len(case), *(n for pair in case for n in pair), *best, *loss)
