"""The words of the report, explained for a reader who does not train models."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("Task", "One question the model answers about a sample, such as whether a patient will die in hospital."),
    ("Stage", "A point in time at which a group of tasks was learned together. Stage 0 is the first training."),
    ("Modality", "One kind of input: vital signs, laboratory values, notes, images."),
    ("Logit", "The raw number a model gives before it is turned into a probability."),
    (
        "Bitwise equal",
        "The stored numbers agree in every bit; not merely close. Measured on the same machine and the same batches.",
    ),
    (
        "Backward transfer",
        "How a task's quality changed after the stage that learned it, because of later tasks. Negative is worse.",
    ),
    (
        "Forward transfer",
        "How much better a task was learned for what was learned before it, against a network that learned it alone.",
    ),
    ("Forgetting", "How far the quality on a task has fallen from its best value because later tasks were learned."),
    (
        "AUROC",
        "Probability that a random sample with the event is ranked above a random one without it. 0.5 is chance, 1 "
        "is perfect.",
    ),
    (
        "AUPRC",
        "Average precision: mean share of true alarms over all thresholds. Chance level is the share of samples with "
        "the event, so it must be read beside the prevalence.",
    ),
    ("F1", "Harmonic mean of precision and recall at a threshold of 0.5, or of the most probable class."),
    ("Brier", "Mean squared distance between probability and outcome. Lower is better."),
    (
        "ECE",
        "Expected calibration error: how far predicted probabilities are from observed frequencies on average. Lower "
        "is better.",
    ),
    (
        "R2",
        "Share of the variation of the target that the prediction explains. 1 is perfect, 0 is predicting the mean.",
    ),
    ("RMSE, MAE", "Typical size of the error in the unit of the target, squared or absolute. Lower is better."),
    (
        "95 % interval",
        "Range of the metric when the test subjects are drawn again and again with replacement. It holds the "
        "uncertainty of the test set, not that of training.",
    ),
    ("Expert, router", "A small network inside the model, and the part that chooses which experts a sample goes to."),
    ("Truncation", "Keeping only the strongest directions of what a stage learned, so that it can be stored cheaply."),
)
