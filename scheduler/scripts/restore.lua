-- Gives a budget that remembers nothing what its key was billed in the last window, each request where it falls.
-- include: pace
--
-- KEYS     as in reserve.lua
-- ARGV[1]  window    ms
-- ARGV[2], [3], [4], ...  triples of age (ms), requests and tokens
-- Reply: 1, or 0 where the budget remembers for itself

if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('ZREM', KEYS[2], '')
local width = tonumber(ARGV[1]) / BUCKETS
for i = 2, #ARGV, 3 do
  local bucket = string.format('%.0f', math.floor((now - tonumber(ARGV[i])) / width))
  local requests, tokens = string.match(redis.call('HGET', KEYS[4], bucket) or '0 0', '(%S+) (%S+)')
  redis.call('HSET', KEYS[4], bucket,
    string.format('%.0f %.0f', tonumber(requests) + tonumber(ARGV[i + 1]), tonumber(tokens) + tonumber(ARGV[i + 2])))
end
redis.call('HSET', KEYS[1], 'last', ms(now), 'window', ARGV[1])
for _, key in ipairs({KEYS[1], KEYS[4]}) do redis.call('PEXPIRE', key, KEPT_MS) end
return 1
