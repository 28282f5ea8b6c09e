#!/usr/bin/env python3
"""The published integer program in HiGHS beside `exflow place`, on one thread, on the same counts.

    pip install highspy numpy
    cargo bench -p exflow-placement -- export runs/12x8x4.npz 12x8x4
    cargo build --release
    python3 placement/benches/highs.py runs/12x8x4.npz --ranks 4 --seconds 120

Two forms. `published` is the program of arXiv 2401.08383 (eq. 8-12) with tokens of equal routes added up, which changes
nothing but its size: x[l,i,g] in {0,1} says that expert i of layer l is on rank g, r[l,i,j] >= |x[l,i,g] - x[l+1,j,g]|
that a token which goes from i to j moves, and the moves are to be few. `same` is the form that HiGHS does best with:
y[l,i,j,g] <= x[l,i,g], x[l+1,j,g] says that both are on g, and the tokens that stay are to be many. The time that counts
for HiGHS is the whole of it: it never reaches what `exflow place` proves optimal at once.
"""
import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import highspy
import numpy as np


def model(seconds: float) -> highspy.Highs:
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", seconds)
    return solver


def placement(solver: highspy.Highs, layers: int, experts: int, ranks: int) -> np.ndarray:
    """x[l,i,g]: every expert on one rank, every rank with equally many of each layer."""
    x = np.array([[[solver.addBinary() for _ in range(ranks)] for _ in range(experts)] for _ in range(layers)])
    for layer in range(layers):
        for expert in range(experts):
            solver.addConstr(sum(x[layer, expert]) == 1)
        for rank in range(ranks):
            solver.addConstr(sum(x[layer, :, rank]) == experts // ranks)
    return x


def published(counts: np.ndarray, ranks: int, seconds: float) -> tuple[highspy.Highs, np.ndarray]:
    pairs, experts, _ = counts.shape
    solver = model(seconds)
    x = placement(solver, pairs + 1, experts, ranks)
    moves = []
    for layer, i, j in np.argwhere(counts > 0):
        moved = solver.addVariable(lb=0, ub=1)
        moves.append(float(counts[layer, i, j]) * moved)
        for rank in range(ranks):
            solver.addConstr(moved >= x[layer, i, rank] - x[layer + 1, j, rank])
            solver.addConstr(moved >= x[layer + 1, j, rank] - x[layer, i, rank])
    solver.minimize(sum(moves))
    return solver, x


def same(counts: np.ndarray, ranks: int, seconds: float) -> tuple[highspy.Highs, np.ndarray]:
    pairs, experts, _ = counts.shape
    solver = model(seconds)
    x = placement(solver, pairs + 1, experts, ranks)
    stays = []
    for layer, i, j in np.argwhere(counts > 0):
        for rank in range(ranks):
            both = solver.addVariable(lb=0, ub=1)
            stays.append(float(counts[layer, i, j]) * both)
            solver.addConstr(both <= x[layer, i, rank])
            solver.addConstr(both <= x[layer + 1, j, rank])
    solver.maximize(sum(stays))
    return solver, x


def moved(counts: np.ndarray, holders: np.ndarray) -> float:
    """Tokens that change their rank under holders [L, E]."""
    apart = holders[:-1, :, None] != holders[1:, None, :]
    return float((counts * apart).sum())


def ours(exflow: str, path: Path, ranks: int) -> tuple[float, float, float]:
    """Cost, bound and seconds of `exflow place`."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "p.json"
        command = [exflow, "place", "--affinity", path, "--ranks", ranks, "--threads", 1, "--time-limit", "1s"]
        subprocess.run([*map(str, command), "--out", str(table)], check=True, capture_output=True)
        table = json.loads(table.read_text())
    return table["cost"], table["lower_bound"], table["history"][-1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("affinity", type=Path, help="counts without a wrap")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="time for each form in HiGHS")
    parser.add_argument("--exflow", default="target/release/exflow")
    arguments = parser.parse_args()
    counts = np.load(arguments.affinity)["transitions"]
    if counts.shape[1] % arguments.ranks:
        parser.error("the published program needs ranks that divide the experts")
    cost, bound, seconds = ours(arguments.exflow, arguments.affinity, arguments.ranks)
    print(f"exflow place      cost {cost:>10.0f}  bound {bound:>10.0f}  {seconds:>9.4f} s")
    for form in (published, same):
        solver, x = form(counts, arguments.ranks, arguments.seconds)
        start = time.monotonic()
        solver.run()
        took = time.monotonic() - start
        values = np.asarray(solver.getSolution().col_value)
        shares = values[np.vectorize(lambda variable: variable.index)(x)] if len(values) else None
        if shares is None or abs(shares.sum() - x.shape[0] * x.shape[1]) > 1e-3:
            print(f"HiGHS, {form.__name__:9}  no placement found        {took:>9.1f} s")
            continue
        found = moved(counts, shares.argmax(axis=2))
        print(
            f"HiGHS, {form.__name__:9}  cost {found:>10.0f}  {100 * (found / cost - 1):>8.2f} % above  {took:>9.1f} s,"
            f" {took / seconds:,.0f} times as long"
        )


if __name__ == "__main__":
    main()
