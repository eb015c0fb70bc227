"""The verbs. A stage's module, of the same name, is loaded when it is used."""

STAGES = {
    "prepare": "Raw files, or the textbook, become cases in splits.",
    "refine": "A teacher says of what kind the cases are.",
    "lessons": "Lessons in the textbook's language, for a model to start from.",
    "design": "A teacher writes prompts from solved cases; the best on validation cases is kept.",
    "label": "A teacher answers the training cases.",
    "curate": "Labels are graded; what fails or stands on nothing goes out.",
    "sft": "A student learns the labels.",
    "distill": "A student learns what the teacher believes of each token.",
    "calibrate": "A model's confidence is held against gold: probabilities, abstention, sets of diseases.",
    "predict": "Models answer the held-out cases.",
    "judge": "A model judges answers by a rubric, or two models' answers in pairs.",
    "evaluate": "Answers are measured: a table and a page.",
    "export": "A trained model leaves: merged weights, card, data sheet, a submission.",
}
