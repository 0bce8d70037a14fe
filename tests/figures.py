"""What eval.py shows on request: figures of a run, and two students example by example.

    python eval.py runs/rte --plot                            # calls plot(); needs matplotlib
    python eval.py runs/rte/armada/0 runs/rte/undistilled/0   # calls agreement()
"""
import json

import numpy as np

from data import UserError, find_task
from eval import bootstrap_interval, by_run, headline, mcnemar

def plot(cells):
    """Writes learning_curves.png, arms.png and, given two doses, dose_response.png into each run's folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    def mark(ax, x, values, colour):
        """The seeds as faint dots, their mean with its interval where there is one."""
        ax.plot([x] * len(values), values, ".", color="0.65")
        ax.plot([x, x], bootstrap_interval(values) or [np.nan, np.nan], "_-", color="black", markersize=10)
        ax.plot(x, np.mean(values), "o", color="black", markerfacecolor=colour)

    labels = {"learning_curves": "epoch (mean over seeds)",
              "arms": "dots are seeds, hollow circles controls, bars 95 % intervals of the mean",
              "dose_response": "dose of the picture, RHO in painter:RHO; dots are seeds, bars 95 % intervals"}
    for run, task, arms in by_run(cells):
        axes = {name: Figure(figsize=(7, 4.5), layout="constrained").subplots() for name in labels}
        (curves, dots, doses), mean_at = axes.values(), {}
        metric = headline(task, [cell for seeds in arms.values() for cell in seeds.values()])
        for i, (arm, seeds) in enumerate(arms.items()):
            values, by_epoch = [100 * cell["dev"][metric] for cell in seeds.values()], {}
            logs = "".join((run / arm / str(seed) / "log.jsonl").read_text() for seed in seeds)
            for line in map(json.loads, logs.splitlines()):
                if "dev" in line:
                    by_epoch.setdefault(line["epoch"], []).append(100 * line["dev"][metric])
            style = "osD^v<>PX*"[i % 10] + ("-", "--", ":", "-.")[i % 4]  # told apart in grey print too
            curves.plot(by_epoch.keys(), [np.mean(seen) for seen in by_epoch.values()], style,
                        color=str(0.75 * i / len(arms)), label=arm)
            first = next(iter(seeds.values()))
            mark(dots, i, values, "white" if first.get("control") else "black")
            kind, _, rho = first.get("teacher", "").partition(":")
            if kind == "painter" and (arm == "armada" or arm.startswith("dose-")):
                mean_at[float(rho or 1)] = np.mean(values)
                mark(doses, float(rho or 1), values, "black")
            elif arm == "undistilled":
                doses.legend([doses.axhline(np.mean(values), color="0.4", linestyle="--")], [arm])
        doses.plot(*zip(*sorted(mean_at.items())), color="black")
        dots.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
        curves.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        for name, ax in [*axes.items()][:3 if len(mean_at) > 1 else 2]:
            ax.set(xlabel=labels[name], ylabel=f"{task.name}, dev {metric} (%)")
            ax.figure.savefig(run / f"{name}.png", dpi=150)
            print(f"wrote {run / name}.png")

def agreement(cells, right):
    """The text on two cells {folder: metrics}, given for each: is a dev example answered right?"""
    task, other = (metrics["task"] for metrics in cells.values())
    a, b = ("/".join(folder.parts[-3:]) for folder in cells)
    if task != other or not find_task(task).labels:
        raise UserError(f"{a} and {b}: example by example, give two cells of one classification task")
    (both, only_a, only_b, neither), p = mcnemar(*right)
    return (f"{task}, {len(right[0])} dev examples: both right {both}, only {a} {only_a}, "
            f"only {b} {only_b}, both wrong {neither}; McNemar's exact p {p:.2g}")
