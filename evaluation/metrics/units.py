"""Of whom the volumes of a set are: subjects, not scans, were drawn independently of each other."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evaluation.metrics.intervals import FEWEST, TOO_FEW, bootstrap_interval, random_halves

Statistic = Callable[..., float]  # of the indices of volumes, one tensor (n,) per set


@dataclass(frozen=True)
class Units:
    """The subjects of a set's volumes, by which these are resampled, halved and paired.

    Two scans of one subject are more alike than those of two subjects, so that N scans tell less of other subjects
    than N subjects would.

    subjects, classes: (N,) of each volume, both numbered from 0. A subject can have volumes of several classes.
    """

    subjects: Tensor
    classes: Tensor
    num_classes: int = 1

    @classmethod
    def of(cls, *classes: Sequence[Hashable | None]) -> "Units":
        """classes: the subject of each volume, class after class; None: nobody else's."""
        numbers: dict[Hashable, int] = {}
        subjects = [
            numbers.setdefault((i, j) if subject is None else subject, len(numbers))
            for i, of_class in enumerate(classes)
            for j, subject in enumerate(of_class)
        ]
        counts = torch.tensor([len(of_class) for of_class in classes])
        of_volumes = torch.arange(len(classes)).repeat_interleave(counts)
        return cls(torch.tensor(subjects, dtype=torch.long), of_volumes, len(classes))

    @classmethod
    def own(cls, *counts: int) -> "Units":
        """Each volume is of a subject of its own. counts: volumes of each class."""
        return cls.of(*([None] * count for count in counts))

    def __len__(self) -> int:
        """Volumes."""
        return len(self.subjects)

    def __getitem__(self, chosen: Tensor) -> "Units":
        """Those of some of the volumes."""
        return Units(self.subjects[chosen].unique(return_inverse=True)[1], self.classes[chosen], self.num_classes)

    @cached_property
    def num_subjects(self) -> int:
        return len(self.subjects.unique())

    @property
    def num_others(self) -> int:
        """Volumes of other subjects that each one has beside it, at least."""
        return len(self) - int(self.subjects.bincount().max())

    @property
    def shared(self) -> Tensor | None:
        """The subjects where a volume shares its own with another; None where there is nothing to be minded."""
        return self.subjects if self.num_subjects < len(self) else None

    def count(self, role: str) -> dict[str, int]:
        """What figures say of the set: its volumes, and its subjects where these are not as many."""
        return {role: len(self)} | ({f"{role} subjects": self.num_subjects} if self.shared is not None else {})

    def said(self, role: str = "") -> str:
        """As `count`, in words: "40 real volumes of 10 subjects"."""
        plural = "s" if self.num_subjects > 1 else ""
        subjects = f" of {self.num_subjects} subject{plural}" if self.shared is not None else ""
        return " ".join(filter(None, (str(len(self)), role, "volumes"))) + subjects

    @property
    def each(self) -> str:
        """The word that a limit of subjects needs in a message beside `said`."""
        return " subjects" if self.shared is not None else ""

    @cached_property
    def of_classes(self) -> list[Tensor]:
        """The volumes of each class."""
        return [(self.classes == label).nonzero()[:, 0] for label in range(self.num_classes)]

    @cached_property
    def combinations(self) -> dict[tuple[int, ...], list[Tensor]]:
        """Classes -> the volumes of each subject that has volumes of just these."""
        volumes: dict[int, list[int]] = {}
        for i, subject in enumerate(self.subjects.tolist()):
            volumes.setdefault(subject, []).append(i)
        found: dict[tuple[int, ...], list[Tensor]] = {}
        classes = self.classes.tolist()
        for of_subject in volumes.values():
            found.setdefault(tuple(sorted({classes[i] for i in of_subject})), []).append(torch.tensor(of_subject))
        return found

    @cached_property
    def strata(self) -> list[list[Tensor]]:
        """The volumes of each subject, in groups that resamples draw from separately.

        A set of two classes would else differ most by how many it has of each. Where subjects have volumes of several
        classes, those of the same classes are a group; of fewer than three, part of that with most classes in common.
        """
        groups = {classes: list(subjects) for classes, subjects in self.combinations.items()}
        for classes in sorted(groups, key=lambda classes: len(groups[classes])):
            others = [other for other in groups if other != classes and set(other) & set(classes)]
            if len(groups[classes]) < FEWEST and others:
                nearest = max(others, key=lambda other: (len(set(other) & set(classes)), len(groups[other])))
                groups[nearest] += groups.pop(classes)
        return list(groups.values())

    @property
    def fewest(self) -> int:
        """Subjects of the class or stratum with the fewest."""
        of_classes = [len(self.subjects[volumes].unique()) for volumes in self.of_classes]
        return min([*of_classes, *map(len, self.strata)])

    def volumes(self, chosen: Sequence[Tensor]) -> Tensor:
        """The volumes of some subjects of each stratum, as often as these are chosen."""
        strata = zip(self.strata, chosen, strict=True)
        return torch.cat([stratum[i] for stratum, of_stratum in strata for i in of_stratum.tolist()])

    def halvings(self, most: Sequence[int], num: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`num` times two random sets of volumes, each of another subject, with equal numbers of each class.

        A scan of each subject: sets with several would differ more from each other than from what a perfect generator
        makes, whose volumes are of as many people as there are. most: volumes of each class that a set may have.
        """
        generator = torch.Generator().manual_seed(seed)

        def one_of(volumes: Tensor, label: int) -> int:
            volumes = volumes[self.classes[volumes] == label]
            return volumes[torch.randint(len(volumes), (), generator=generator)].item()

        halves = {
            classes: min(len(subjects) // 2, sum(most[label] for label in classes))
            for classes, subjects in self.combinations.items()
        }
        halves = {classes: half for classes, half in halves.items() if half}
        draws = [random_halves(len(self.combinations[c]), half, num, seed) for c, half in halves.items()]
        for drawn in zip(*draws, strict=True):
            left = list(most)
            pairs: list[tuple[int, int]] = []
            for classes, both in zip(halves, drawn, strict=True):
                for i, (a, b) in enumerate(zip(*(half.tolist() for half in both), strict=True)):
                    label = classes[i % len(classes)]
                    if left[label]:
                        left[label] -= 1
                        pairs.append(tuple(one_of(self.combinations[classes][j], label) for j in (a, b)))
            yield tuple(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T)


def by_subject(statistic: Statistic, sets: Sequence[Units]) -> tuple[Statistic, list[int]]:
    """A statistic of volumes as one of subjects of each stratum of each set, and how many there are to choose from."""

    def of_subjects(*chosen: Tensor) -> float:
        strata = iter(chosen)
        return statistic(*(units.volumes([next(strata) for _ in units.strata]) for units in sets))

    return of_subjects, [len(stratum) for units in sets for stratum in units.strata]


def interval_of_enough(statistic: Statistic, sets: Sequence[Units], **options) -> tuple[float, float] | str:
    """`bootstrap_interval` over subjects, or "n too small" where a class has fewer than three."""
    if min(units.fewest for units in sets) < FEWEST:
        return TOO_FEW
    return bootstrap_interval(*by_subject(statistic, sets), **options)
