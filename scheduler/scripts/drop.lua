-- Forget a leased task.
-- KEYS[1]  prefix of the namespace
-- ARGV     id, epoch
-- reply    1, or 0 when the lease is lost
local prefix, id = KEYS[1], ARGV[1]
if redis.call('HGET', prefix .. ':task:' .. id, 'epoch') ~= ARGV[2] then
  return 0
end
redis.call('DEL', prefix .. ':task:' .. id)
redis.call('ZREM', prefix .. ':leased', id)
return 1
