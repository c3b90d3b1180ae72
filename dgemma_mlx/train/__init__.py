"""Training and evaluation of DiffusionGemma models.

Fine-tuning of a loaded model: ``dataset`` reads examples from JSONL files, ``batches`` draws training batches from
them, ``finetune`` prepares and carries out a run, ``estimate`` predicts its length and memory, and ``fuse`` merges an
adapter into a checkpoint.

Shared by all trainers: ``objective`` (the loss), ``optimizer``, ``loop`` and ``gradient_checkpointing``.

Evaluation: ``evaluate`` counts correct answers, and ``sudoku`` generates puzzles with exactly one solution.

The built-in demo model: ``demo`` trains it, with its data in ``tasks`` and its tokenizer in ``demo_tokenizer``;
``export`` writes its checkpoint and ``score`` its score card.
"""
