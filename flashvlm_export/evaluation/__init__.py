"""Questions with known answers → accuracy of a bundle over its token budget, with intervals.

- ``dataset.py``      the JSON-lines data set: reading it, and naming every line that cannot be used
- ``metrics.py``      each metric as published: what one answer is worth, and the figures over many
- ``vqa_answers.py``  answer normalisation of the VQA evaluation
- ``journal.py``      append-only record of answers, so that nothing is asked twice
- ``evaluate.py``     asks what the journal lacks
- ``bootstrap.py``    resampled sums of questions or groups of them
- ``results.py``      answers → figures with 95 % intervals, as a record and a table
- ``compare.py``      selectors side by side, on the same questions
- ``plot.py``         accuracy over budget as a picture
- ``convert/``        published file formats → data set

Knows neither runtime nor sessions: the command line hands it a function that answers one question.
"""
