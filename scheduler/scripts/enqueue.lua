-- Put tasks into a lane, each at most once.
-- KEYS[1]  prefix of the namespace; all other keys are built from it and share its hash tag
-- ARGV     lane, then id and payload (JSON) of each task
-- reply    how many were added; a task that is already known is left as it is
local prefix, lane = KEYS[1], ARGV[1]
local added = 0
for i = 2, #ARGV, 2 do
  local task = prefix .. ':task:' .. ARGV[i]
  if redis.call('EXISTS', task) == 0 then
    local position = redis.call('HINCRBY', prefix .. ':meta', 'position', 1)
    redis.call('HSET', task, 'payload', ARGV[i + 1], 'lane', lane, 'position', position, 'epoch', '0', 'deliveries', 0,
      'attempts', 0)
    redis.call('ZADD', prefix .. ':ready:' .. lane, position, ARGV[i])
    added = added + 1
  end
end
if added > 0 then
  redis.call('XADD', prefix .. ':wake', 'MAXLEN', '~', 16, '*', 'added', added)
end
return added
