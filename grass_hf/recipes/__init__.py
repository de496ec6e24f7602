"""Recipes: a training run as one YAML file, checked before anything is loaded, trained by the Trainer or by TRL.

parse      the file and the flags behind it -> `schema.Recipe`
sources    a hub id, local files or a packaged text -> `rows`, each of which `places` can find in its file
layouts    rows as they come -> the columns a task trains on;  `turns` reads those of chats
encode     text -> tokens: packed documents, labelled sentences, preferences;  `chats` finds what is learnt in a chat
models     the tokenizer and the model
tasks      all of it -> a Trainer
checks     what is wrong with folders, settings and model;  `rehearsal` is the dry run of `grass-hf validate`
runner     train, evaluate, save, report
"""
