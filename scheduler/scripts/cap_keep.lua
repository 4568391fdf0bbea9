-- Says which holds are of requests that live. A memory that was born since takes them up.
-- include: account
--
-- KEYS            as in cap_reserve.lua
-- ARGV[1] hold_ttl  ms
-- ARGV[2...]        op, most, doubtful, and the birth of the memory that gave it, of each
-- Reply: the birth of the memory that has them now, '' where nothing is remembered

local birth = redis.call('HGET', KEYS[1], 'birth')
if not birth then return '' end
for i = 2, #ARGV, 4 do
  local op, most, doubtful, theirs = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local unknown = redis.call('HEXISTS', KEYS[3], op) == 0
  -- Of this memory and gone: it was settled, or abandoned and charged.
  if unknown and birth ~= theirs and redis.call('SISMEMBER', KEYS[4], op) == 0 then
    redis.call('HSET', KEYS[3], op, most .. ' ' .. doubtful)
    redis.call('HINCRBY', KEYS[1], 'held', most)
    unknown = false
  end
  if not unknown then redis.call('ZADD', KEYS[2], whole(now + tonumber(ARGV[1])), op) end
end
keep()
return birth
