"""Every sentence of a comparison, made of plain facts: kinds with numbers, and frames of tests."""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_lab.common.formats import amount, duration, joined, some
from diffusion_lab.report.tests import JOINT, PAIRED, WELCH
from diffusion_lab.runs.files import DIRTY
from diffusion_lab.runs.results import OWN, Sampling

TESTS = {
    JOINT: "a model of all arms with Tukey's correction",
    WELCH: "Welch's t-test",
    PAIRED: "a paired t-test",
}
SHORT = {JOINT: "the model of all arms", WELCH: "Welch's test", PAIRED: "the paired test"}
TUNED_BY = {
    "fid": "FID to validation images",
    "kid": "KID to validation images",
    "val/loss": "validation loss",
}
NAMED = 3  # arms that a sentence names; more are counted
GAP_SHARE = 0.05  # of the gap whose number of seeds is said


def tuned_by(metric: str) -> str:
    """The words for a metric by which trials were chosen."""
    return TUNED_BY.get(metric, metric)


def percent(share: float) -> str:
    """A share in two digits: 0.5 %, 12 %, 130 %."""
    return f"{100 * share:.2g} %" if abs(share) < 0.995 else f"{100 * share:.0f} %"


def digits(value: float, count: int = 2) -> str:
    """A number with two digits, or with none behind the point: 0.012, 4.9, 123; -0 is 0."""
    return f"{value:.{count}g}" if abs(value) < 10**count - 0.5 else f"{value:,.0f}"


def ended(sentence: object) -> str:
    """A sentence with a full stop, unless it ends as one already: with a stop or question mark."""
    text = str(sentence)
    return text if text.endswith((".", "?", "!")) else f"{text}."


def p_in(p: float) -> str:
    """A p-value to one digit, as few runs know it no better."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.1g}"


def few(names: Sequence[str]) -> str:
    """Up to three names, or their number."""
    return joined([*names]) if len(names) <= NAMED else f"{len(names)} arms"


def between(ends: Sequence[float]) -> str:
    """The smallest and the largest of some amounts; one if both are equal."""
    return " to ".join(dict.fromkeys(f"{each:,}" for each in ends))


HOW: dict[str, Callable[[Any], str]] = {
    "amount": amount,
    "names": lambda names: joined([*map(str, names)]),
    "few": few,
    "percent": percent,
    "between": between,
    "amounts": lambda ends: " to ".join(map(amount, ends)),
    "digits": digits,
}


class _Words(string.Formatter):
    """Formats a value by the name of a function, as in {seconds:duration}."""

    def format_field(self, value: Any, spec: str) -> str:
        return HOW[spec](value) if spec in HOW else format(value, spec)


BESIDE = "which its own images and time leave out"
SENTENCES: dict[str, Any] = {
    "said": "{text}",
    # runs and measurements that are left out
    "no_samples": "{run} is left out: it is an autoencoder; samples of a VAE are measured by "
    "`diffusion-lab evaluate run={run}`",
    "damaged": "{run} is left out: its {file} is damaged and cannot be read",
    "unfinished": "{run} is left out: it is unfinished at step {steps:,}; resume it with "
    "`diffusion-lab {command} resume={run}`",
    "pruned": "{run} is left out: a search ended it early, at step {steps:,}",
    "repeated": "{run} is left out: {newer}, which finished later, has the same settings and seed",
    "weights_gone": "Later evaluations of {run} are left out: its checkpoints are gone, so it is "
    "unknown whether the metrics belong to its weights",
    "measured_otherwise": "{run} is left out: its samples were measured in another way; measure "
    "them like the others with `diffusion-lab evaluate run={run} metrics...=...`",
    "losses_differ": "Denoising losses are left out: objective, schedule, data or first stage "
    "differ, so the losses are different quantities",
    "few_for_infinity": "FID-infinity is left out: {samples:,} samples are too few to extrapolate "
    "from; it needs {fewest:,}",
    "lacking_seeds": lambda seeds, runs: (
        f"The sampling seeds {joined([*map(str, seeds)])} of the protocol are left out, as not all "
        f"runs were measured by each: {some(runs)}; measure these by `diffusion-lab evaluate`"
    ),
    "not_finite": "{run} has no finite {metrics:names}, so means leave its seed out there",
    "report": "Copy ratios of {run} are left out: {reason}; measure them again, sampled like the "
    "rest, with `diffusion-lab memorization run={run}`",
    "reports_unequal": "Copy ratios are left out, because runs measured them in different ways: "
    "{differences}; run `diffusion-lab memorization` on all of them with equal settings",
    # protocol and tests
    "protocols_differ": "The runs follow different protocols, so no metric is the primary one",
    "no_protocol": "No protocol was fixed before the runs, so no metric is the primary one",
    "protocol": lambda metric, test, seeds: (
        f"Protocol: {metric} decides, by {TESTS[test]} over seeds {', '.join(map(str, seeds))}"
    ),
    "stop": "Stopping rule: {rule}",
    "planned_later": lambda arm, seeds: (
        f"The protocol of the first run that ended lacks {joined([*map(str, seeds)])}, seeds of "
        f"{arm}; that they were added no interval takes into account"
    ),
    "not_measured": "{metric} was not measured, so the protocol decides nothing",
    "no_commit": "No commit is known that held this protocol",
    "commit": lambda commit: (
        f"Commit {commit.removesuffix(DIRTY)[-40:][:9]} was checked out for the first run that "
        "ended" + ", with changes that were not committed" * commit.endswith(DIRTY)
    ),
    "other_seeds": lambda arm, missing, beside: (
        f"{arm} has other seeds than the protocol: "
        + joined(
            [f"{', '.join(map(str, missing))} missing"] * bool(missing)
            + [f"{', '.join(map(str, beside))} beside"] * bool(beside)
        )
        + ", which tables count, and tests only where no run has the protocol's" * bool(beside)
    ),
    "unequal_spread": "Runs of some arms vary more than those of others, so pairs are tested by "
    "Welch's test with Holm's correction",
    "correction": "{name}'s correction covers the {tests} pairs that are asked about; other "
    "metrics have intervals without correction",
    "unmeasured_arms": "{arms:few} have no finite {metric}",
    "few_runs": "{arms:few} cannot be tested: a test needs two runs of each arm",
    "bias": "Real images have {metric} {real:digits} at this number of samples, more than a third "
    "of the best arm's {value:digits}: judge by KID, which has no such bias",
    "variance": "Of the variance between runs of an arm {training:percent} is due to training and "
    "{sampling:percent} to sampling",
    "seeds_needed": lambda gap, seeds: (
        f"To find a gap of {percent(GAP_SHARE)} ({digits(gap)}) in four of five studies takes "
        f"{seeds or 'more than 1,000'} runs of each arm"
    ),
    # tuning
    "not_tuned": "Nothing was tuned for each network: all have the values of one recipe",
    "some_tuned": "Only {arms} of {all} arms were tuned",
    "tuned": lambda metric, images, seeds, keys, overrides, counts: (
        f"Tuned by {tuned_by(metric)}: {', '.join(keys)}, at {between(counts)} values"
        + (", each" if images or overrides else "")
        + (f" on {images:,} images" if images else "")
        + (f" with {joined(overrides)}" if overrides else "")
        + f", with seed {', '.join(map(str, seeds))}"
    ),
    "tuned_unequally": "Networks were tuned with unequal budgets, or by different metrics",
    "at_an_end": "The best {key} of {arm}, {value:g}, is at an end of its grid",
    # budgets and machines
    "drawn_elsewhere": "{arm} was drawn by another program, of whose training nothing is known",
    "time_limits": lambda seconds, images: (
        f"{'Time limits are unequal' if len(seconds) > 1 else 'Runs had a time limit'}: "
        + joined([f"{each:,} seconds" if each else "none" for each in seconds])
        + f"; runs saw {between(images)} images"
    ),
    "images": "Every run saw {images:between} images",
    "budgets_unequal": "Budgets are unequal: runs saw {images:amounts} images",
    "flops_equal": "Images are unequal, but training FLOPs, with those of teachers and of initial "
    "weights as far as known, are equal within {share:percent}: runs saw {images:amounts} images",
    "operations_unequal": "Operations are unequal: arms take {least:amount} to {most:amount} FLOPs "
    "to train on an image, at equal numbers of images",
    "parameters_unequal": "Parameters are unequal: arms have {least:amount} to {most:amount}",
    "taught": lambda arm, images, calls: (
        f"{arm} has a teacher that "
        + (f"saw {amount(images)} images" if images else "was trained elsewhere")
        + (f" and answered {amount(calls)} calls" if calls else "")
        + f", {BESIDE}"
    ),
    "first_stage": lambda arm, seconds: (
        f"{arm} has a first stage with a training of its own"
        + (f", of {duration(seconds)}" if seconds else "")
        + f", {BESIDE}"
    ),
    "began": lambda arm, images: (
        f"{arm} starts from weights of another training"
        + (f", of {amount(images)} images" if images else "")
        + f", {BESIDE}"
    ),
    "aligned": "{arm} is aligned with a frozen network, whose calls no FLOPs here count",
    "flattered": "{arm} was aligned to the features that FID compares, which flatters it",
    "spikes": "Gradients spiked in {runs} of {all} runs of {arm}, to {most:.0f} times their "
    "median; a lower learning rate may suit it better",
    "speeds_vary": "Runs of {arms:few} differ by more than a tenth in images/s, as on a machine "
    "that others use: their times say little, and no cost in time is drawn",
    "other_machines": lambda machines: (
        "Runs were trained on different machines, by which time, speed and memory differ"
        + (f": {'; '.join(machines)}" if len(machines) < NAMED else f", {len(machines)} in all")
    ),
    "one_choice": "All runs use the same choice of training images ({key}={seed}), so the "
    "intervals do not show how much another choice would change",
    # scaling
    "no_law": "{series}, {form}: no law of {title}, because {reason}",
    "law": lambda series, form, title, offset, exponent, ends: (
        f"{series}, {form}: {title} above E = {offset} falls as C^-{exponent:.2g}"
        + (", 95 % interval {:.2g} to {:.2g}".format(*ends) if ends else ", from one seed")
    ),
    "law_extrapolated": "{series}, {form}: its front lies outside of the trained sizes and images, "
    "so C^-b is extrapolated",
    "law_at_border": "{series}, {form}: {at:.0f} of {points:.0f} points are of an outermost size "
    "or number of images, so others may be better",
    "not_held_out": "{series}, {form}: {size} is not predicted from the others: {reason}",
    "held_out": "{series}, {form}: fitted without {size}, off by at most {error:percent} there "
    "(points: {points:.0f})",
    "law_fails": "{series}, {form}: off by more than a tenth at {size}, this law does not predict",
    "unchanged": "{series}, {form}: the next smaller size's values, after as many images, are off "
    "by {error:percent} there",
    # sampling
    "drawn_by": lambda arm, way: f"{arm} is drawn by {way_in(way)}",
    "by_validation": "Samples are compared with validation images, by which these runs may have "
    "been chosen; for a report, measure them by `diffusion-lab evaluate metrics.reference=train`",
    "setting": lambda runs, images, data, protocol, sampling, seeds, classifier: (
        f"{runs} runs{' and sets of images' * images} on {data}; {protocol['num_samples']:,} "
        f"samples each, compared with {reference_in(protocol)} by features of "
        f"{protocol['extractor']}{f', accuracy by {classifier}' if classifier else ''}; "
        f"{drawing_in(sampling, seeds)} [protocol {protocol['fingerprint']}]"
    ),
}


class Fact:
    """A fact of some kind, with its numbers and names; as text it is a sentence."""

    def __init__(self, kind: str, **values: Any):
        self.kind, self.values = kind, values

    def __str__(self) -> str:
        sentence = SENTENCES[self.kind]
        if isinstance(sentence, str):
            return _Words().vformat(sentence, (), self.values)
        return sentence(**self.values)


def reference_in(protocol: Mapping[str, Any]) -> str:
    """The reference of a protocol in words."""
    words = {
        "validation": "validation images",
        "FILE": f"images of file {protocol.get('reference_file')}",
    }
    kind = words.get(str(protocol.get("reference")), "training images")
    count = protocol["reference_images"]
    return f"{count:,} {kind}" if count else kind.replace("images of", "the statistics in")


def drawing_in(sampling: Sampling, seeds: Sequence[int | str]) -> str:
    """The sampler, guidance and seeds in words."""
    if not sampling:
        return way_in(sampling)
    several = f"the mean of sampling seeds {joined([*map(str, seeds)])}"
    one = f"sampling seed {seeds[0]}"
    own = "each run sampled with its training seed"
    said = own if OWN in seeds else several if len(seeds) > 1 else one
    return f"{way_in(sampling)}, {said}"


def way_in(sampling: Mapping[str, Any]) -> str:
    """The sampler and guidance in words; what else differs from the run's own is named, too."""
    sampler, guidance = sampling.get("sampler"), sampling.get("guidance") or {}
    if not sampling:
        return "drawn by other programs"
    if sampler == OWN:
        return "each arm drawn in its own way"
    drawn = sampler["_target_"].rpartition(".")[2] if sampler else "one network call"
    if sampler:
        drawn += f" with {sampler['steps']} steps" if sampler.get("steps") else ""
        drawn += f", guidance scale {guidance.get('scale')}"
    more = (f", {key} {sampling[key]}" for key in ("average", "step") if key in sampling)
    return drawn + "".join(more)
