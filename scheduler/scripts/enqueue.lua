-- Put tasks of one job into its lane, each at most once.
-- include: turns adding
-- KEYS[1]  prefix of the namespace; all other keys are built from it and share its hash tag
-- ARGV     as add_tasks takes them
-- reply    how many were added
local added = add_tasks(1)
return added
