-- A shard has its marker: remove its task, announce it, keep its dead letters; in one step and only here.
-- Needs no fence: the marker in the dataset is the truth, whoever found it.
-- KEYS[1]  prefix of the namespace
-- ARGV     id, announcement (JSON), then key and dead letter (JSON) of each failed row
-- reply    1 when the task was there, 0 when it had been finished before
local prefix, id = KEYS[1], ARGV[1]
local key = prefix .. ':task:' .. id
for i = 3, #ARGV, 2 do
  redis.call('HSET', prefix .. ':dead', ARGV[i], ARGV[i + 1])
end
local lane = redis.call('HGET', key, 'lane')
if not lane then
  return 0
end
redis.call('DEL', key)
redis.call('ZREM', prefix .. ':ready:' .. lane, id)
redis.call('ZREM', prefix .. ':leased', id)
redis.call('ZREM', prefix .. ':delayed', id)
redis.call('XADD', prefix .. ':announced', 'MAXLEN', '~', 100000, '*', 'shard', ARGV[2])
return 1
