"""What an experiment learns from: finds its data and checks that there is enough of it."""

from __future__ import annotations

from normuon_lab.runs.config import Experiment
from normuon_lab.runs.corpus import Corpus, check_lengths, load_corpus


def load_task(experiment: Experiment) -> Corpus:
    """The data of an experiment, long enough for its batches and evaluations.

    Raises:
        InputError: it cannot be read, or is too short.
    """
    corpus = load_corpus(
        experiment.data, tokenizer=experiment.tokenizer, vocab_size=experiment.model.vocab_size
    )
    check_lengths(corpus, experiment)
    return corpus
