"""Published benchmark files → data set. They are the user's own copies: nothing is downloaded.

- ``registry.py``   names of the formats; checks and writes what a format returns
- ``common.py``     reading, image paths, options and instructions
- ``vqav2.py``, ``textvqa.py``, ``vizwiz.py``  ten annotators per question, VQA accuracy
- ``gqa.py``        one answer, exact
- ``pope.py``       is an object there: F1
- ``mme.py``        two yes-or-no questions per image
- ``scienceqa.py``, ``mmbench.py``, ``seed.py``  multiple choice
"""
