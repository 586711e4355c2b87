"""How sure a score is: standard errors, intervals, pass@k, consensus. Knows no eval and no run.

All functions are pure. Attempts are given as parallel arrays, one entry per attempt: `question`
int codes 0..Q-1 (every code occurs), `correct` bool. Attempts of one question are one cluster:
they share its difficulty, so they are not independent draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    IntArray = NDArray[np.integer[Any]]
    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.floating[Any]]

# The 0.975 quantile of the standard normal distribution.
Z_95 = 1.959963984540054


def default_metrics(
    samples_df: pd.DataFrame, answer_group_correctness_df: pd.DataFrame
) -> dict[str, Any]:
    """`correctness_metrics` and `consensus@n` of attempts whose answers fall into groups.

    samples_df: one row per attempt: instance str, attempt int, answer_group_id.
    answer_group_correctness_df: one row per answer group: instance, answer_group_id, is_correct.
    No attempts: {}. Missing columns, groups without a verdict or with two raise ValueError.
    """
    if samples_df.empty:
        return {}
    question, group, correct = join_answer_groups(samples_df, answer_group_correctness_df)
    attempt = samples_df["attempt"].to_numpy()
    return {
        **correctness_metrics(question, correct),
        **consensus(question, attempt, group, correct),
    }


def correctness_metrics(
    question: IntArray, correct: BoolArray, unscored: IntArray | None = None
) -> dict[str, Any]:
    """Accuracy with its uncertainty, the counts behind it and pass@k.

    `unscored` holds the question's code of each attempt that has no verdict; its codes may go on
    beyond those of `question`. An attempt is missing when it is unscored, or when a question has
    fewer attempts than another; where any is, `accuracy_worst_case` and `accuracy_best_case` count
    the missing ones as wrong and as right. No scored attempts: the counts alone.
    """
    import numpy as np

    if unscored is None:
        unscored = np.zeros(0, dtype=np.int64)
    num_all = 1 + max(question.max(initial=-1), unscored.max(initial=-1))
    attempts = np.bincount(question, minlength=num_all)
    hits = np.bincount(question[correct], minlength=num_all)
    asked = attempts + np.bincount(unscored, minlength=num_all)
    wanted = int(asked.max(initial=0))
    missing = wanted * int(num_all) - len(question)
    counts = {
        "num_questions": int(np.count_nonzero(attempts)),
        "num_attempts": len(question),
        "num_missing": missing,
    }
    scored = attempts > 0
    metrics: dict[str, Any] = {}
    if scored.any():
        metrics = accuracy(attempts[scored], hits[scored])
    metrics.update(counts)
    if missing:
        metrics["accuracy_worst_case"] = float((hits / wanted).mean())
        metrics["accuracy_best_case"] = float(((hits + wanted - attempts) / wanted).mean())
    if scored.any():
        metrics.update(pass_at_k(attempts[scored], hits[scored]))
    return metrics


def accuracy(attempts: IntArray, hits: IntArray) -> dict[str, Any]:
    """`accuracy`, `accuracy_stderr` and `accuracy_ci95` from each question's attempts and hits.

    Accuracy is the mean over questions of the mean over attempts. With one question nothing is
    known of the spread between questions: the standard error is None, the interval [0, 1].
    """
    means = hits / attempts
    mean = float(means.mean())
    stderr = clustered_stderr(means)
    return {
        "accuracy": mean,
        "accuracy_stderr": stderr,
        "accuracy_ci95": accuracy_interval(mean, stderr, len(means), int(attempts.sum())),
    }


def clustered_stderr(means: FloatArray) -> float | None:
    """Standard error of the mean of `means`, one mean per question; None for fewer than two.

    sqrt(sum((m_i - m)^2) / (Q (Q - 1))): the clustered standard error of Miller, "Adding error
    bars to evals" (2024), section 2.2, for one cluster per question, each of weight 1/Q, with the
    small-sample factor Q / (Q - 1).
    """
    if len(means) < 2:
        return None
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def accuracy_interval(
    mean: float, stderr: float | None, num_questions: int, num_attempts: int
) -> list[float]:
    """The 95 % interval [low, high] of an accuracy: Wilson's, at the effective sample size.

    Wilson's score interval (Wilson 1927; Brown, Cai, DasGupta 2001) keeps its coverage at few
    questions and near 0 and 1, where mean +- 2 standard errors claims too much. Clusters enter by
    the effective number of attempts n / deff, with Kish's design effect (Kish 1965) and the
    correction for few clusters of Korn and Graubard (1998), (t[n-1] / t[Q-1])^2. It is at most n,
    as a design effect below 1 is chance, and at least Q, as even attempts that always agree tell
    as much as one. With one attempt per question this is the plain Wilson interval.
    """
    if stderr is None:
        return [0.0, 1.0]
    effective = float(num_questions)
    variance = mean * (1 - mean)
    if variance > 0 and num_attempts > num_questions:
        independent = variance / (num_attempts - 1)
        few_clusters = (t_quantile_95(num_attempts - 1) / t_quantile_95(num_questions - 1)) ** 2
        # stderr is 0 where all questions have the same share of hits.
        design_effect = max(1.0, stderr**2 / independent)
        effective = max(effective, num_attempts / design_effect * few_clusters)
    return wilson_interval(mean, effective)


def wilson_interval(proportion: float, n: float) -> list[float]:
    """Wilson's 95 % score interval [low, high] of a proportion seen in `n` trials, n > 0.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    z2 = Z_95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(proportion * (1 - proportion) / n + z2 / (4 * n * n))
    # Rounding alone would keep the interval of 0 or 1 from reaching it.
    low = 0.0 if proportion == 0 else max(0.0, centre - half)
    high = 1.0 if proportion == 1 else min(1.0, centre + half)
    return [low, high]


def t_quantile_95(df: int) -> float:
    """The 0.975 quantile of Student's t with `df` >= 1 degrees of freedom, to 0.2 %.

    Closed forms for 1 and 2; beyond, the expansion 26.7.5 of Abramowitz and Stegun, "Handbook of
    mathematical functions" (1964).
    """
    if df == 1:
        return math.tan(math.pi * 0.475)
    if df == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(df) ** power for power, term in enumerate(terms, start=1))


def pass_at_k(attempts: IntArray, hits: IntArray) -> dict[str, float]:
    """`pass@1` ... `pass@k` up to the smallest number of attempts of any question.

    The chance that k attempts, drawn without replacement from a question's n with c hits, hold a
    hit: 1 - C(n - c, k) / C(n, k), averaged over questions. Unbiased; source: Chen et al.,
    "Evaluating large language models trained on code" (2021), equation 1.
    """
    import numpy as np

    misses = attempts - hits
    all_miss = np.ones(len(attempts))
    metrics = {}
    for k in range(1, int(attempts.min()) + 1):
        # C(m, k) / C(n, k) grows from k - 1 by one factor; it stays 0 once k exceeds the misses.
        all_miss *= np.maximum(misses - k + 1, 0) / (attempts - k + 1)
        metrics[f"pass@{k}"] = float((1 - all_miss).mean())
    return metrics


def consensus(
    question: IntArray, attempt: NDArray[Any], group: IntArray, correct: BoolArray
) -> dict[str, float]:
    """`consensus@n`: how often the most frequent of n answers is right; {} for no attempts.

    n is the smallest number of attempts of any question; of one with more, the n with the lowest
    attempt ids vote. `group` is an int code per attempt, equal for equal answers to one question.
    Tied answers share the question in equal parts, which is what a fair draw would give on
    average: deterministic, and independent of the order of attempts and of the groups' names.
    Source: Wang et al., "Self-consistency improves chain of thought reasoning" (2022).
    """
    import numpy as np

    if len(question) == 0:
        return {}
    order = np.lexsort((attempt, question))
    sizes = np.bincount(question)
    n = int(sizes.min())
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    voters = order[rank < n]
    pair = question[voters].astype(np.int64) * (int(group.max()) + 1) + group[voters]
    _, first, votes = np.unique(pair, return_index=True, return_counts=True)
    of_question = question[voters][first]
    most = np.zeros(len(sizes), dtype=np.int64)
    np.maximum.at(most, of_question, votes)
    winning = votes == most[of_question]
    winners = np.bincount(of_question[winning])
    right = np.bincount(of_question[winning], weights=correct[voters][first][winning])
    return {f"consensus@{n}": float((right / winners).mean())}


def join_answer_groups(
    samples_df: pd.DataFrame, answer_group_correctness_df: pd.DataFrame
) -> tuple[IntArray, IntArray, BoolArray]:
    """For each row of samples_df: its question's code, its group's code, whether it is correct.

    The frames are those of `default_metrics`, which errors they raise.
    """
    import numpy as np
    import pandas as pd

    require_columns(samples_df, "samples_df", ("instance", "attempt", "answer_group_id"))
    groups_df = answer_group_correctness_df
    require_columns(
        groups_df, "answer_group_correctness_df", ("instance", "answer_group_id", "is_correct")
    )
    num_samples = len(samples_df)
    question, _ = pd.factorize(pd.concat([samples_df["instance"], groups_df["instance"]]))
    group, groups = pd.factorize(
        pd.concat([samples_df["answer_group_id"], groups_df["answer_group_id"]])
    )
    if (question < 0).any() or (group < 0).any():
        raise ValueError("instance and answer_group_id must not be empty (None or NaN)")
    pair = question.astype(np.int64) * len(groups) + group
    verdict, has_verdict = read_verdicts(groups_df["is_correct"])
    known, inverse = np.unique(pair[num_samples:][has_verdict], return_inverse=True)
    is_right = np.bincount(inverse, verdict[has_verdict], minlength=len(known))
    given = np.bincount(inverse, minlength=len(known))
    if (split := (is_right > 0) & (is_right < given)).any():
        at = int(np.flatnonzero(pair[num_samples:] == known[split][0])[0])
        raise ValueError(
            "answer_group_correctness_df says both right and wrong of instance"
            f" {groups_df['instance'].iloc[at]!r}, answer group"
            f" {groups_df['answer_group_id'].iloc[at]}; a group needs one verdict"
        )
    where = np.searchsorted(known, pair[:num_samples])
    found = where < len(known)
    found[found] = known[where[found]] == pair[:num_samples][found]
    if not found.all():
        lacking = samples_df.loc[~found, ["instance", "answer_group_id"]].drop_duplicates()
        shown = ", ".join(map(str, lacking.head(5).itertuples(index=False, name=None)))
        raise ValueError(
            f"{len(lacking)} pairs of (instance, answer_group_id) in samples_df have no is_correct"
            f" in answer_group_correctness_df: {shown}{', ...' if len(lacking) > 5 else ''}"
        )
    return question[:num_samples], group[:num_samples], is_right[where] > 0


def read_verdicts(is_correct: pd.Series) -> tuple[BoolArray, BoolArray]:
    """For each row: whether it says right, and whether it says anything (is not None or NaN).

    Right and wrong are True and False, as Python's or numpy's, or 1 and 0. ValueError for others,
    such as the text "False" or 0.5.
    """
    verdict = is_correct.isin([True]).to_numpy(dtype=bool)
    has_verdict = is_correct.notna().to_numpy(dtype=bool)
    odd = is_correct[has_verdict & ~verdict & ~is_correct.isin([False]).to_numpy(dtype=bool)]
    if len(odd):
        raise ValueError(
            f"is_correct must be True or False in every row; {len(odd)} of {len(is_correct)} hold"
            f" something else, the first {odd.iloc[0]!r}"
        )
    return verdict, has_verdict


def require_columns(df: pd.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    """Raise ValueError that names the columns which `df` lacks."""
    lacking = [column for column in columns if column not in df.columns]
    if lacking:
        raise ValueError(f"{name} lacks the columns {lacking}; it has {list(df.columns)}")
