"""The commands that answer: `duetvl infer`, `duetvl chat`, `duetvl bench infer`."""
