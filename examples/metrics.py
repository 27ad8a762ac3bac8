"""Metrics for the `Trainer`, computed on the spot: nothing is downloaded."""

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal their references."""

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self):
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references: one class each",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def most_likely_class(logits, labels):
    """For `preprocess_logits_for_metrics`: keep the winner of every prediction, so that evaluation needs no memory."""
    return logits.argmax(dim=-1)


def sequence_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`: accuracy of one class per sequence."""
    return Accuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)


def next_token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`: accuracy of the prediction of every token from those before it."""
    predictions, labels = prediction.predictions[:, :-1].ravel(), prediction.label_ids[:, 1:].ravel()
    counted = labels != -100  # the Trainer's padding
    return Accuracy().compute(predictions=predictions[counted], references=labels[counted])
