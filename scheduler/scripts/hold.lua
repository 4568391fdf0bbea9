-- Closes the budget of one API key for a while: nothing starts before.
--
-- KEYS[1] state  hash, as in reserve.lua
-- ARGV[1] hold   ms
-- Reply: gate_ms (the key is closed for so long, never less than before)

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local gate = math.max(tonumber(redis.call('HGET', KEYS[1], 'gate') or 0), now + tonumber(ARGV[1]))
redis.call('HSET', KEYS[1], 'gate', string.format('%.3f', gate))
redis.call('PEXPIRE', KEYS[1], 86400000)
return math.ceil(gate - now)
