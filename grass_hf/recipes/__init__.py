"""Recipes: a training run as one YAML file, checked before anything is loaded, trained by the Trainer or by TRL.

parse      the file and the flags behind it -> `schema.Recipe`
sources    a hub id, local files or a packaged text -> rows;  `rows` says in which file and line a row stands
layouts    rows as they come -> the columns a task trains on
encode     text -> tokens: packed streams, chats with the loss on the replies, labelled sentences
models     the tokenizer and the model
tasks      all of it -> a Trainer
checks     what `grass-hf validate` finds out without training
runner     train, evaluate, save, report
"""
