-- A shard has its marker: remove its task, announce it, keep its dead letters; in one step and only here.
-- Needs no fence: the marker in the dataset is the truth, whoever found it.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     id, job, announcement (JSON), then key and dead letter (JSON) of each failed row
-- reply    1 when the task was there, 0 when it had been finished before
local id, job = ARGV[1], ARGV[2]
also_when_full()
for i = 4, #ARGV, 2 do
  redis.call('HSET', prefix .. ':dead:' .. job, ARGV[i], ARGV[i + 1])
  redis.call('SADD', prefix .. ':jobs', job)
end
if not remove(id) then
  return 0
end
redis.call('XADD', prefix .. ':announced', 'MAXLEN', '~', 100000, '*', 'shard', ARGV[3])
return 1
