-- Ends the hold of a request: charges what it cost, and gives back the rest. Settling twice changes nothing.
-- include: account
--
-- KEYS            as in cap_reserve.lua
-- ARGV[1] op      string
-- ARGV[2] charge  tokens: as billed, 0 for what was refused or not sent, the doubtful ones where nobody knows
-- ARGV[3] birth   of the memory that gave the hold
-- ARGV[4] noted   '1' when a batch was noted in the dataset under this hold: from now on everybody looks there first
-- Reply: tokens spent, -1 where nothing is remembered. The spend log has the request already: who reads it next knows.

redis.call('ZREM', KEYS[2], ARGV[1])

local spent = tonumber(redis.call('HGET', KEYS[1], 'spent') or -1)
local charge = ARGV[2]
-- Whoever reads the logs just now may have passed the batch already, too.
if ARGV[4] == '1' and redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'batches', ARGV[1]) end
local known = redis.call('HGET', KEYS[3], ARGV[1])
if known then
  local most = tonumber(string.match(known, '^%S+'))
  redis.call('HDEL', KEYS[3], ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'held', whole(-most))
  spent = redis.call('HINCRBY', KEYS[1], 'spent', charge)
elseif ARGV[3] ~= '' and redis.call('HGET', KEYS[1], 'birth') ~= ARGV[3] and redis.call('SADD', KEYS[4], ARGV[1]) == 1 then
  -- Sent before the memory was lost. A sign of life that comes behind must not bring the hold back.
  if spent >= 0 then
    -- The logs that were read at its birth do not have it.
    spent = redis.call('HINCRBY', KEYS[1], 'spent', charge)
  elseif redis.call('HEXISTS', KEYS[1], 'looking') == 1 then
    -- Whoever reads the logs just now may have passed the line already.
    redis.call('HINCRBY', KEYS[1], 'late', charge)
  end
end
keep()
return spent
